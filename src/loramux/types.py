"""The words that travel between packages: adapters, compositions, sampling settings, outputs.

Knows nothing of torch, tokenizers or HTTP.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loramux.errors import InvalidField, LoramuxError

FinishReason = Literal["stop", "length", "abort", "error"]
Modality = Literal["image", "audio", "video"]

# A sum of scaled adapters: ((digest, scale), ...), sorted, no digest twice, no scale 0. () is the base.
Composition = tuple[tuple[str, float], ...]

MAX_LOGPROBS = 20

MAX_NAME_LENGTH = 128
_PART = r"[A-Za-z0-9_][A-Za-z0-9._:@-]*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")


def is_adapter_name(name: str) -> bool:
    """Whether callers may give an adapter this name: up to `MAX_NAME_LENGTH` characters of ASCII, in
    parts divided by single slashes, none of which begins with a dot."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter. Equal bytes have equal digests, whatever the name.

    `digest` is the hex SHA-256 of configuration and weights, `source` the folder it came from,
    `max_r` the largest rank of any of its modules, `num_bytes` the size of its weights.
    `adapts_encoder` says that it has weights for a tower or connector of a multimodal model, `labels`
    what its classification head tells apart; () if it has none. `invocation` are the tokens of an
    activated LoRA, which applies from their last occurrence in a prompt on; () applies everywhere.
    `affine` says that it scales or shifts outputs of layers, as DoRA and trained biases do.
    `vocabulary_size` counts the tokens of an adapter that changes the embedding or the output head, by
    `vocabulary_rows` rows of its own and by LoRA; 0: it changes neither. `tokenizer` is equal for
    adapters with the same tokenizer and chat template of their own; "": the base model's.
    """

    name: str
    digest: str
    source: str
    max_r: int
    num_bytes: int
    adapts_encoder: bool = False
    labels: tuple[str, ...] = ()
    affine: bool = False
    invocation: tuple[int, ...] = ()
    vocabulary_size: int = 0
    vocabulary_rows: int = 0
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What a request asks for: an adapter by name, and how strongly it applies. `version` is the digest
    of a version that the caller holds (`Registry.hold`); "": the one that the name has now."""

    name: str
    scale: float = 1.0
    version: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidField("an adapter needs a name", field="lora")
        if not math.isfinite(self.scale):
            raise InvalidField(f"scale must be finite, not {self.scale}", field="lora")


def compose(members: Sequence[tuple[str, float]], *, in_turn: bool = False) -> Composition:
    """Canonical form of a list of (digest, scale): equal digests add up, scale 0 drops out. `in_turn`:
    the order says something, and stays.

    >>> compose([("b", 1.0), ("a", 0.5), ("a", 0.25)])
    (('a', 0.75), ('b', 1.0))
    """
    total: dict[str, float] = {}
    for digest, scale in members:
        total[digest] = total.get(digest, 0.0) + scale
    kept = [(digest, scale) for digest, scale in total.items() if scale != 0.0]
    return tuple(kept if in_turn else sorted(kept))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request is continued; names, defaults and meaning follow vLLM's.

    Raises `InvalidField` (a ValueError) naming the first field that is out of range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: every token
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: whatever the context leaves
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    detokenize: bool = True  # False: answers are tokens, their text stays empty
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._coerce()
        for name, ok, need in self._rules():
            if not ok:
                raise InvalidField(
                    f"{name} must be {need}, not {getattr(self, name)!r}", field=name
                )

    def _coerce(self) -> None:
        """Accept what vLLM accepts: a single stop string, lists, a dict of biases."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        set_field = object.__setattr__
        set_field(self, "stop", stop)
        set_field(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bias: Any = self.logit_bias or ()
        pairs = bias.items() if isinstance(bias, dict) else bias
        set_field(self, "logit_bias", tuple((int(token), float(value)) for token, value in pairs))

    def _rules(self) -> list[tuple[str, bool, str]]:
        def between(value: float, low: float, high: float) -> bool:
            return math.isfinite(value) and low <= value <= high

        return [
            ("n", 1 <= self.n <= 128, "between 1 and 128"),
            ("presence_penalty", between(self.presence_penalty, -2, 2), "between -2 and 2"),
            ("frequency_penalty", between(self.frequency_penalty, -2, 2), "between -2 and 2"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "greater than 0",
            ),
            ("temperature", between(self.temperature, 0, 100), "between 0 and 100"),
            ("top_p", between(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1, 0 or a positive number"),
            ("min_p", between(self.min_p, 0, 1), "between 0 and 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("detokenize", self.detokenize or not self.stop, "True where stop strings are given"),
            ("stop_token_ids", all(t >= 0 for t in self.stop_token_ids), "token ids"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            (
                "min_tokens",
                self.min_tokens >= 0
                and (not self.max_tokens or self.min_tokens <= self.max_tokens),
                "between 0 and max_tokens",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
            (
                "logit_bias",
                all(t >= 0 and math.isfinite(v) for t, v in self.logit_bias),
                "token ids with finite values",
            ),
        ]

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def with_max_tokens(self, max_tokens: int) -> SamplingParams:
        return replace(self, max_tokens=max_tokens)


PoolingTask = Literal["embed", "classify"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """What is made of a prompt that nothing is generated for; names follow vLLM's.

    "embed": the final hidden state of its last token, cut to its first `dimensions`, then of length 1
    with `normalize`. "classify": what the classification head makes of it, as probabilities with
    `use_activation`, else the logits. Raises `InvalidField` naming the first field that is wrong.
    """

    task: PoolingTask = "embed"
    normalize: bool = True
    dimensions: int | None = None  # None: all
    use_activation: bool = True

    def __post_init__(self) -> None:
        if self.task not in ("embed", "classify"):
            raise InvalidField(
                f"the task {self.task!r} is not served", field="task", remedy="embed or classify"
            )
        if self.dimensions is not None and (self.task != "embed" or self.dimensions < 1):
            raise InvalidField(
                "dimensions must be at least 1, and is for embeddings", field="dimensions"
            )

    @property
    def n(self) -> int:
        """Answers of a prompt, as `SamplingParams` has it."""
        return 1


NOTHING_SAMPLED = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
"""Of a request that is pooled."""


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """An embedding; or a value for each of `labels`. `values` are 32-bit floats."""

    values: array[float]
    labels: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The likeliest."""
        return self.labels[max(range(len(self.labels)), key=self.values.__getitem__)]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats, of the model's own distribution) and vocabulary rank (1 = likeliest)."""

    token_id: int
    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token and, likeliest first, the alternatives asked for."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class Delta:
    """News of one answer: what was added since the last Delta of the same (request, index).

    The last one of an answer has a `finish_reason`; with "error", `error` says why. Nobody changes one;
    it is not frozen, because a step makes hundreds, and a frozen one takes three times as long.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: LoramuxError | None = None
    num_cached_tokens: int = 0
    pooled: PoolingOutput | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image, sound or video of a prompt, as a model's encoder takes it.

    `digest` (hex) stands for the content and for how it was prepared: equal digests have equal
    `inputs`. `spans` are the prompt tokens [start, stop) whose embeddings its vectors replace, in
    order. `inputs` is what the model's processor made of it, name -> tensor; only the encoder looks.
    """

    modality: Modality
    digest: str
    spans: tuple[tuple[int, int], ...]
    inputs: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def num_vectors(self) -> int:
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """Prompt tokens, placeholders written out, with the media that stand in them.

    `positions` int32 [3, N] are rotary positions where a model counts them in three dimensions
    (M-RoPE); None: a token's position is its index. `shift` is what tokens behind the prompt add to
    their index.
    """

    token_ids: tuple[int, ...]
    items: tuple[MediaItem, ...] = ()
    positions: Any = field(default=None, repr=False, compare=False)
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A request whose prompt is tokens and whose adapters are versions, ready for the scheduler.

    `starts` says of each of `adapters` from which prompt token on it applies, None: nowhere; () of all:
    from the first on. `text` is the tokenizer and chat template (`models.text.TextProcessor`) that its
    adapters bring; None: the base model's.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    adapters: tuple[tuple[AdapterRef, float], ...] = ()
    arrival_s: float = 0.0
    media: MediaPrompt | None = None  # None: text alone
    pooling: PoolingParams | None = None  # None: tokens are generated
    starts: tuple[int | None, ...] = ()
    tenants: tuple[str, ...] = ()  # names of its adapters as asked for, sorted, each once
    text: Any = field(default=None, repr=False, compare=False)
