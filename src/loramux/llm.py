"""Offline inference in vLLM's shape: a script moves here by changing its import."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.progress import Progress

from loramux.config import EngineConfig
from loramux.config.keywords import engine_config
from loramux.engine.activation import not_invoked
from loramux.engine.adapter_check import check_adapter as check_adapter
from loramux.engine.adapter_check import check_deltas_of as check_deltas_of
from loramux.engine.default_adapters import (
    MARK,
    choose_adapters,
    default_int_ids,
    default_sources,
    is_default,
)
from loramux.engine.engine import Engine
from loramux.engine.memory_table import show
from loramux.engine.pooling_outputs import ClassificationRequestOutput, EmbeddingRequestOutput
from loramux.engine.resolving import load_first, resolver_of
from loramux.errors import ConfigError, InvalidField, LoramuxError
from loramux.offline_arguments import (
    Asked,
    Encoded,
    LoRA,
    LoRARequest,
    Params,
    Prompt,
    Uses,
    loras_of,
    params_of,
    prompts_of,
    tokens_of,
    uses_of,
)
from loramux.offline_media import Media, OfflineMedia, modalities_of
from loramux.types import (
    Delta,
    MediaPrompt,
    PoolingOutput,
    PoolingParams,
    SamplingParams,
    TokenLogprob,
)


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    `cumulative_logprob` and `logprobs` are None unless logprobs were asked for. `logprobs[i]` maps
    token ids to their log-probabilities at step i: the chosen one first, then the likeliest.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, TokenLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRA = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers, in the order of `index`.

    `prompt_token_ids` have the placeholders of media written out. `lora_request` is what was used, be it
    asked for or a default of the prompt's media; of several, the list. `not_invoked` names those of
    them that did not apply: activated LoRAs whose invocation the prompt lacks.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    lora_request: LoRA = None
    num_cached_tokens: int = 0
    pooled: PoolingOutput | None = field(default=None, repr=False)  # of a prompt that was pooled
    not_invoked: tuple[str, ...] = ()


class LLM:
    """A model with its adapters in this process.

    Keyword arguments are the fields of `EngineConfig`, of `MediaConfig` and, with `enable_lora=True`,
    of `LoRAConfig`. A name that is neither is refused, but for vLLM's settings at a value that asks for
    nothing (`pipeline_parallel_size=1`). Raises ConfigError or UnsupportedModel.
    """

    def __init__(self, model: str, *, enable_lora: bool = False, **settings: Any):
        self.engine = Engine(engine_config(model, enable_lora=enable_lora, **settings))
        if sys.stderr.isatty():  # the log has it in any case
            show(self.engine.memory)
        self._ids = itertools.count()
        self._paths: dict[str, str] = {}
        self._resolver = resolver_of(self.config.lora)
        self._media = OfflineMedia(self.config.media, self.engine.media.modalities)
        try:
            self._defaults = self._load_defaults()
        except BaseException:
            self.engine.close()
            raise

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    def get_tokenizer(self, lora_request: LoRA = None) -> Any:
        """The tokenizer of prompts with these adapters, the base model's unless one brings its own."""
        (composition,) = loras_of(lora_request, 1)
        self._register(composition or [])
        return self.engine.text_of(uses_of(composition or [])).tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRA | Sequence[LoRA] = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue each prompt: a text, `{"prompt": ...}`, `{"prompt_token_ids": [...]}` or token ids.
        The dicts may have `multi_modal_data` (see `offline_media`), with its placeholders in the prompt.

        `sampling_params` and `lora_request` are one for all or one a prompt. In a list of adapters
        for several prompts, each entry may itself be a list: a composition, the empty one the base
        model; None is the default adapters of the prompt's media, if any. Returns one RequestOutput a
        prompt, in order. Raises InvalidField, AdapterRejected and their like before anything runs.
        """
        asked = [self._asked(prompt) for prompt in prompts_of(prompts)]
        return self._run(asked, sampling_params, lora_request, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRA | Sequence[LoRA] = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several (a list of lists). Contents may be
        lists of parts as a server takes them, and `{"type": "image_pil", "image_pil": ...}`."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        how: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "template_kwargs": chat_template_kwargs,
        }
        asked = []
        for conversation in conversations:
            turns, media = self._media.of_messages(conversation)
            render = partial(self._render, turns, media, how)
            asked.append(Asked(render, modalities_of(media)))
        return self._run(asked, sampling_params, lora_request, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: LoRA | Sequence[LoRA] = None,
        use_tqdm: bool = False,
    ) -> list[EmbeddingRequestOutput]:
        """The final hidden state of the last token of each prompt, of length 1 unless
        `pooling_params` say otherwise. Prompts and adapters as for `generate`."""
        params = pooling_params or PoolingParams(task="embed")
        answered = self._pool(prompts, params, "embed", lora_request, use_tqdm)
        return [EmbeddingRequestOutput.of(output) for output in answered]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: LoRA | Sequence[LoRA] = None,
        use_tqdm: bool = False,
    ) -> list[ClassificationRequestOutput]:
        """The classes of each prompt, by the head that its adapter brings or else the model's. Prompts
        and adapters as for `generate`; label counts may differ from prompt to prompt."""
        params = pooling_params or PoolingParams(task="classify")
        answered = self._pool(prompts, params, "classify", lora_request, use_tqdm)
        return [ClassificationRequestOutput.of(output) for output in answered]

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter ahead of its first use. Raises AdapterRejected with every reason."""
        self._register([lora_request])
        return True

    def close(self) -> None:
        """Stop the reader thread. The object cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, prompt: Prompt) -> Asked:
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, Mapping):
            return Asked(lambda _, tokens=list(prompt): (None, tokens))  # type: ignore[misc]
        known = {"prompt", "prompt_token_ids", "multi_modal_data"}
        if extra := set(prompt) - known:
            raise InvalidField(f"a prompt cannot have {sorted(extra)}", field="prompt")
        media = self._media.of_data(prompt.get("multi_modal_data") or {})
        given = prompt["prompt_token_ids" if "prompt_token_ids" in prompt else "prompt"]
        encode = partial(self._encode, prompt.get("prompt"), given, media)
        return Asked(encode, modalities_of(media))

    def _encode(
        self, text: str | None, given: str | Sequence[int], media: list[Media], uses: Uses
    ) -> Encoded:
        if media:
            return text, self.engine.media_of(uses).prepare(given, media)
        if isinstance(given, str):
            return text, self.engine.text_of(uses).encode(given)
        return text, list(given)

    def _render(
        self, turns: list[dict[str, Any]], media: list[Media], how: dict[str, Any], uses: Uses
    ) -> Encoded:
        prompt: list[int] | MediaPrompt
        text = self.engine.text_of(uses)
        if self.engine.media.modalities:
            prompt = self.engine.media_of(uses).render_chat(turns, media, **how)
        else:
            prompt = text.render_chat(turns, **how)
        return text.decode(tokens_of(prompt)), prompt

    def _pool(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: PoolingParams | Sequence[PoolingParams],
        task: str,
        lora_request: LoRA | Sequence[LoRA],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        tasks = {one.task for one in ([params] if isinstance(params, PoolingParams) else params)}
        if tasks - {task}:
            raise InvalidField(f"the task of pooling_params must be {task!r}", field="task")
        asked = [self._asked(prompt) for prompt in prompts_of(prompts)]
        return self._run(asked, params, lora_request, use_tqdm)

    def _run(
        self,
        asked: list[Asked],
        given: Params | Sequence[Params] | None,
        lora_request: LoRA | Sequence[LoRA],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = params_of(given, len(asked))
        loras = [
            self._by_default(one.modalities) if named is None else named
            for one, named in zip(asked, loras_of(lora_request, len(asked)), strict=True)
        ]
        self._register([lora for composition in loras for lora in composition])
        encoded = [
            one.encode(uses_of(composition)) for one, composition in zip(asked, loras, strict=True)
        ]
        outputs: dict[str, RequestOutput] = {}
        errors: list[LoramuxError] = []
        try:
            for (text, prompt), param, composition in zip(encoded, params, loras, strict=True):
                output = self._submit(text, prompt, param, composition)
                outputs[output.request_id] = output
            self._drain(outputs, errors, use_tqdm)
        except BaseException:
            for request_id in outputs:
                self.engine.cancel(request_id)
            self.engine.step()
            raise
        if errors:
            raise errors[0]
        return list(outputs.values())

    def _submit(
        self,
        text: str | None,
        prompt: list[int] | MediaPrompt,
        params: SamplingParams | PoolingParams,
        composition: Sequence[LoRARequest],
    ) -> RequestOutput:
        ids = tokens_of(prompt)
        left = (self.config.max_model_len or 0) - len(ids)
        if isinstance(params, SamplingParams) and 0 < left < (params.max_tokens or 0):
            # Offline, as in vLLM, an answer ends where the context does.
            params = dataclasses.replace(
                params, max_tokens=left, min_tokens=min(params.min_tokens, left)
            )
        request_id = str(next(self._ids))
        uses = uses_of(composition)
        versions = self.engine.submit(request_id, prompt, params, uses)
        idle = not_invoked(versions, ids)
        names = [use.name for use, ref in zip(uses, versions, strict=True) if ref in idle]
        lora: LoRA = composition[0] if len(composition) == 1 else (list(composition) or None)
        answers = [CompletionOutput(index=i, lora_request=lora) for i in range(params.n)]
        if isinstance(params, SamplingParams) and params.logprobs is not None:
            for answer in answers:
                answer.logprobs, answer.cumulative_logprob = [], 0.0
        return RequestOutput(
            request_id, text, ids, answers, lora_request=lora, not_invoked=tuple(names)
        )

    def _drain(
        self, outputs: dict[str, RequestOutput], errors: list[LoramuxError], use_tqdm: bool
    ) -> None:
        """Step until every answer is there."""
        remaining = sum(len(output.outputs) for output in outputs.values())
        with Progress(disable=not use_tqdm) as progress:
            task = progress.add_task("answers", total=remaining)
            while remaining:
                deltas = self.engine.step()
                if not deltas:
                    self.engine.wait()
                for delta in deltas:
                    if (output := outputs.get(delta.request_id)) is None:
                        continue
                    _append(output, delta)
                    if delta.error is not None:
                        errors.append(delta.error)
                    if delta.finished:
                        remaining -= 1
                        progress.advance(task)

    def _load_defaults(self) -> dict[str, LoRARequest]:
        """Read the adapters of `default_mm_loras`; name -> what outputs show of them."""
        ids = default_int_ids(self.config.lora)
        sources = default_sources(self.config.lora)
        for name, path in sources:
            self.engine.add_adapter(name, path)
        return {name: LoRARequest(name, ids[name], path) for name, path in sources}

    def _by_default(self, modalities: frozenset[str]) -> list[LoRARequest]:
        """The adapters of a prompt with such media for which none was named."""
        chosen = choose_adapters(self.config.lora, modalities)
        return [self._defaults[use.name] for use in chosen]

    def _register(self, loras: Sequence[LoRARequest]) -> None:
        """Read adapters that are new, or whose name now means another folder."""
        for lora in loras:
            if lora in self._defaults.values():
                continue
            if is_default(lora.lora_name):
                raise InvalidField(
                    f"LoRARequest {lora.lora_name!r}: names with {MARK} are those of default_mm_loras",
                    field="lora_request",
                )
            store = self.engine.store
            if store is None:
                raise ConfigError(
                    "lora_request needs enable_lora=True", field="lora_request", remedy="set it"
                )
            known = store.registry.current(lora.lora_name)
            moved = bool(lora.lora_path) and self._paths.get(lora.lora_name) != lora.lora_path
            if known is None or moved or lora.load_inplace:
                if known is None and not lora.lora_path and self._resolver is not None:
                    load_first(lora.lora_name, self._resolver, self.engine.add_adapter)
                    continue
                if not lora.lora_path:
                    raise InvalidField(
                        f"LoRARequest {lora.lora_name!r} has no lora_path", field="lora_request"
                    )
                self.engine.add_adapter(lora.lora_name, lora.lora_path, replace=known is not None)
                self._paths[lora.lora_name] = lora.lora_path


def _append(output: RequestOutput, delta: Delta) -> None:
    answer = output.outputs[delta.index]
    answer.text += delta.text
    answer.token_ids += delta.token_ids
    if delta.logprobs is not None and answer.logprobs is not None:
        for entry in delta.logprobs:
            answer.logprobs.append({item.token_id: item for item in (entry.chosen, *entry.top)})
            assert answer.cumulative_logprob is not None
            answer.cumulative_logprob += entry.chosen.logprob
    answer.finish_reason = delta.finish_reason
    answer.stop_reason = delta.stop_reason
    output.num_cached_tokens = max(output.num_cached_tokens, delta.num_cached_tokens)
    output.pooled = delta.pooled
    output.finished = all(a.finish_reason is not None for a in output.outputs)
