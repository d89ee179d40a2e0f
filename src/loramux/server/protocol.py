"""Bodies of the two generation endpoints: every field OpenAI's or vLLM's, and `lora`.

An unknown field is refused. So is a known one whose machinery is missing, when its value would
change the answer; fields that cannot change it (`user`, `metadata`, ...) are accepted.
Null means "the default" everywhere, as it does for OpenAI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux.content import (
    MediaPart,
    Part,
    check_role,
    check_text,
    joined_text,
    media_of,
    parse_parts,
    template_parts,
)
from loramux.errors import InvalidField
from loramux.types import MAX_LOGPROBS, AdapterUse

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]


Text = Annotated[str, AfterValidator(check_text)]

NO_TOOLS = "tool calling is not served"
NO_AUDIO = "answers are text"


class Body(BaseModel):
    """A JSON object with exactly the fields listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    # Field -> (values that ask for nothing, why another one is refused).
    not_served: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="after")
    def _refuse_unserved(self) -> Self:
        refused = [
            (name, f"{name} is refused: {why}")
            for name, (harmless, why) in self.not_served.items()
            if getattr(self, name) is not None and getattr(self, name) not in harmless
        ]
        if refused:
            raise InvalidField(
                "; ".join(reason for _, reason in refused),
                field=refused[0][0],
                remedy="leave out " + ", ".join(name for name, _ in refused),
            )
        return self


class LoraItem(Body):
    """One adapter of a composition; a plain string stands for its name at scale 1."""

    name: Text = Field(min_length=1)
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """Factor on top of the adapter's own alpha / r; may be negative."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StreamOptions(Body):
    include_usage: bool = False
    """Send one more event at the end, with the token counts and no choices."""

    continuous_usage_stats: bool = False
    """Put the token counts so far into every event."""


class GenerationBody(Body):
    """What both endpoints share; sampling fields mean what `SamplingParams` says."""

    model: Text
    """The base model's name, or an adapter's."""

    lora: list[LoraItem] | None = None
    """Adapters whose scaled deltas are summed. Then `model` must be the base model."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Seed | None = None
    stop: list[Text] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[int, float] | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Add `prompt_token_ids` and each choice's `token_ids` to the answer."""

    request_id: str | None = Field(default=None, min_length=1, max_length=128)
    """Becomes part of the answer's `id`."""

    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidField(
                "stream_options needs stream: true",
                field="stream_options",
                remedy="set stream, or leave stream_options out",
            )
        return self

    @property
    def adapters(self) -> tuple[AdapterUse, ...] | None:
        """`lora` in the engine's words; None when the field was not given."""
        if self.lora is None:
            return None
        return tuple(AdapterUse(item.name, item.scale) for item in self.lora)

    @property
    def usage_in_stream(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class CompletionRequest(GenerationBody):
    """`POST /v1/completions`."""

    not_served = {
        "suffix": ((), "only continuation is served, not insertion"),
    }

    prompt: list[Text] | list[list[TokenId]]
    """One prompt or several, as text or as token ids."""

    max_tokens: Count | None = None
    """Most tokens of one answer; 16 if not given."""

    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    """Put the prompt's text before the answer's."""

    add_special_tokens: bool | None = None
    """Whether text prompts get the tokenizer's special tokens; default true."""

    suffix: Any = None
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _to_list(cls, value: Any) -> Any:
        """Every accepted form as a list of prompts; told apart here for one clear error."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(item, str) for item in value):
                return value
            if all(type(item) is int for item in value):
                return [value]
            if all(isinstance(item, list) and item for item in value) and all(
                type(token) is int for item in value for token in item
            ):
                return value
        raise InvalidField(
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists "
            "of token ids, and no list may be empty",
            field="prompt",
        )

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidField(
                "best_of is refused: every answer is returned", field="best_of", remedy="use n"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidField(
                "echo together with logprobs is refused: prompts are not scored", field="echo"
            )
        if self.echo and not isinstance(self.prompt[0], str):
            raise InvalidField("echo needs prompts given as text", field="echo")
        return self


class ChatMessage(Body):
    """One turn. `content` is text, or parts of which some are media; text parts alone are joined by
    newlines."""

    not_served = {
        "tool_calls": (([],), NO_TOOLS),
        "tool_call_id": ((), NO_TOOLS),
        "function_call": ((), NO_TOOLS),
        "audio": ((), NO_AUDIO),
        "refusal": (("",), "it is an output of the API only"),
        "annotations": (([],), "they are an output of the API only"),
    }

    role: Text = Field(min_length=1, max_length=64)
    content: str | list[Part] | None = None
    name: Text | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None
    refusal: Any = None
    annotations: Any = None

    @field_validator(
        "content", mode="plain", json_schema_input_type=str | list[dict[str, Any]] | None
    )
    @classmethod
    def _content(cls, value: Any) -> str | list[Part] | None:
        if isinstance(value, str):
            return check_text(value)
        if isinstance(value, list):
            parts = parse_parts(value)
            return parts if (text := joined_text(parts)) is None else text
        if value is not None:
            raise ValueError("content is a text or a list of parts")
        return None

    @model_validator(mode="after")
    def _check_turn(self) -> Self:
        if self.role in ("tool", "function"):
            raise InvalidField(f"role {self.role!r} is refused: {NO_TOOLS}", field="messages")
        if self.content is None and self.role != "assistant":
            raise InvalidField(f"a {self.role} message needs content", field="messages")
        check_role(self.role, self.media, prefix="content.")
        return self

    @property
    def media(self) -> list[MediaPart]:
        """In the order in which they stand."""
        return media_of(self.content) if isinstance(self.content, list) else []

    def as_turn(self) -> dict[str, Any]:
        """What the chat template of a text model is given; there must be no media."""
        return self._turn(self.content or "")

    def as_turn_of_parts(self) -> dict[str, Any]:
        """What the chat template of a multimodal model is given."""
        return self._turn(template_parts([] if self.content is None else self.content))

    def _turn(self, content: Any) -> dict[str, Any]:
        turn = {"role": self.role, "content": content}
        return turn if self.name is None else {**turn, "name": self.name}


class ChatCompletionRequest(GenerationBody):
    """`POST /v1/chat/completions`."""

    not_served = {
        "tools": (([],), NO_TOOLS),
        "tool_choice": (("none",), NO_TOOLS),
        "functions": (([],), NO_TOOLS),
        "function_call": (("none",), NO_TOOLS),
        "response_format": (({"type": "text"},), "structured output is not served"),
        "modalities": ((["text"],), NO_AUDIO),
        "audio": ((), NO_AUDIO),
        "prediction": ((), "predicted outputs are not served"),
        "reasoning_effort": (("none",), "the model has no such setting"),
        "verbosity": ((), "the model has no such setting"),
        "web_search_options": ((), "there is no web search"),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """Newer name of max_tokens, and stronger; without either the context is the limit."""

    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    """Open the assistant's turn after the messages; default true."""

    continue_final_message: bool | None = None
    """Continue the last message, which must be the assistant's, instead of opening a turn."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables for the chat template."""

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    # Bookkeeping of OpenAI's service; none of it changes an answer.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidField("top_logprobs needs logprobs: true", field="top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidField(
                    "add_generation_prompt and continue_final_message exclude each other",
                    field="continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise InvalidField(
                    "continue_final_message needs a last message of the assistant",
                    field="continue_final_message",
                )
        return self

    @property
    def media(self) -> list[MediaPart]:
        """All that the messages carry, in order; `where` is each one's path in this body."""
        return [
            replace(part, where=f"messages.{index}.content.{part.where}")
            for index, message in enumerate(self.messages)
            for part in message.media
        ]

    @property
    def opens_turn(self) -> bool:
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt
