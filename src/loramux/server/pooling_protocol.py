"""Bodies of the endpoints that make something of a prompt and generate nothing: embeddings, classes.

OpenAI's and vLLM's fields, and `lora`. An unknown field is refused.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from loramux.errors import InvalidField
from loramux.server.protocol import Body, Count, LoraItem, Text, TokenId
from loramux.types import AdapterUse, PoolingParams

MAX_INPUTS = 2048  # OpenAI's


class PoolingBody(Body):
    """What these endpoints share."""

    model: Text
    """The base model's name, or an adapter's."""

    lora: list[LoraItem] | None = None
    """Adapters whose scaled deltas are summed. Then `model` must be the base model."""

    input: list[Text] | list[list[TokenId]]
    """One input or several, as text or as token ids."""

    add_special_tokens: bool | None = None
    """Whether text gets the tokenizer's special tokens; default true."""

    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    """Becomes part of the answer's `id`."""

    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        """Every accepted form as a list of inputs; told apart here for one clear error."""
        inputs = _listed(value)
        if inputs is None:
            raise InvalidField(
                "input must be a string, a list of strings, a list of token ids, or a list of lists "
                "of token ids, and no list may be empty",
                field="input",
            )
        if len(inputs) > MAX_INPUTS:
            raise InvalidField(
                f"input has {len(inputs)} entries, more than {MAX_INPUTS}",
                field="input",
                remedy="send several requests",
            )
        return inputs

    @property
    def adapters(self) -> tuple[AdapterUse, ...] | None:
        """`lora` in the engine's words; None when the field was not given."""
        if self.lora is None:
            return None
        return tuple(AdapterUse(item.name, item.scale) for item in self.lora)


def _listed(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return value
    if all(type(item) is int for item in value):
        return [value]
    token_lists = all(isinstance(item, list) and item for item in value) and all(
        type(token) is int for item in value for token in item
    )
    return value if token_lists else None


class EmbeddingRequest(PoolingBody):
    """`POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    """How vectors are written: as numbers, or as base64 of little-endian 32-bit floats."""

    dimensions: Count | None = None
    """Keep so many of the first numbers of each vector."""

    normalize: bool | None = None
    """Whether vectors have length 1; default true."""

    @property
    def params(self) -> PoolingParams:
        return PoolingParams(
            task="embed", normalize=self.normalize is not False, dimensions=self.dimensions
        )


class ClassifyRequest(PoolingBody):
    """`POST /classify` and `POST /v1/classify`."""

    use_activation: bool | None = None
    """Whether `probs` are probabilities; false: logits. Default true."""

    activation: bool | None = None
    """Older name of use_activation."""

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if None not in (self.use_activation, self.activation) and (
            self.use_activation != self.activation
        ):
            raise InvalidField("activation and use_activation disagree", field="use_activation")
        return self

    @property
    def params(self) -> PoolingParams:
        off = self.use_activation is False or self.activation is False
        return PoolingParams(task="classify", use_activation=not off)
