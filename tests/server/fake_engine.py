"""An engine without a model: it keeps AsyncEngine's contract and answers predictably.

A token is a character (its code point); token 1 is the special token in front of a prompt. The
answer is "<who> index" followed by the prompt's text reversed, where who names the adapters. An item
of media is as many tokens as its modality has letters, each of them "#".
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from array import array
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from loramux.config import EngineConfig, LoRAConfig, MediaConfig
from loramux.engine.default_adapters import default_sources
from loramux.engine.hold import Hold
from loramux.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    InvalidField,
    LoramuxError,
    UnknownModel,
)
from loramux.media import Audio, Image, Video
from loramux.status import AdapterEvent, AdapterStatus, EngineStats, TenantStatus, Unloaded
from loramux.types import (
    AdapterRef,
    AdapterUse,
    Delta,
    MediaItem,
    MediaPrompt,
    PoolingOutput,
    PoolingParams,
    SamplingParams,
    TokenLogprob,
    TokenLogprobs,
)

BASE = "org/base"
SPECIAL = 1


def reference(name: str, source: str = "/adapters/x") -> AdapterRef:
    digest = hashlib.sha256(f"{name}{source}".encode()).hexdigest()
    return AdapterRef(name=name, digest=digest, source=source, max_r=8, num_bytes=1000)


class FakeEngine:
    """`delay_s` a token; `fail_at` (token index) and `fail_with` make an answer fail there.

    `modalities` is what its model takes, `media` its limits; further settings are LoRAConfig's.
    """

    def __init__(
        self,
        adapters: Sequence[str] = ("alpha", "beta"),
        *,
        context: int = 200,
        lora: bool = True,
        modalities: Collection[str] = (),
        media: MediaConfig | None = None,
        adapter_limits: dict[str, Any] | None = None,
        **lora_settings: Any,
    ) -> None:
        self.config = EngineConfig(
            model=BASE,
            max_model_len=context,
            lora=LoRAConfig(**{"max_loras": 4, **lora_settings}) if lora else None,
            media=media or MediaConfig(),
            adapter_limits=adapter_limits,
        )
        self.modalities = frozenset(modalities)
        self.failure: BaseException | None = None
        self.served = {name: reference(name) for name in adapters}
        self.served |= {
            name: reference(name, path) for name, path in default_sources(self.config.lora)
        }
        self.loading: set[str] = set()
        self.delay_s = 0.0
        self.load_delay_s = 0.0
        self.fail_at: int | None = None
        self.fail_with: LoramuxError | None = None
        self.refuse_with: Exception | None = None
        self.seen: list[
            tuple[SamplingParams | PoolingParams, tuple[AdapterUse, ...], list[int]]
        ] = []
        self.seen_media: list[tuple[MediaItem, ...]] = []
        self.request_ids: list[str] = []
        self.running = 0
        self.cancelled = 0
        self.pinned: frozenset[str] = frozenset()
        self.received: tuple[bytes, bytes] | None = None
        self.events: list[list[AdapterEvent] | None] = []
        self.started = False
        self.stopping = False
        self._ended = False
        self._on_load: list[Callable[[AdapterRef, float], None]] = []

    async def start(self) -> None:
        self.started = True

    async def stop(self, drain_s: float = 0.0) -> None:
        self.stopping = True
        deadline = asyncio.get_running_loop().time() + drain_s
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self._ended = True

    def die(self, cause: BaseException) -> None:
        self.failure = cause
        self._ended = True

    def hold(self, adapters: Sequence[AdapterUse]) -> Hold:
        return Hold(None, adapters)

    async def tokenize(
        self, text: str, adapters: Sequence[AdapterUse] = (), *, add_special_tokens: bool = True
    ) -> list[int]:
        tokens = [ord(character) for character in text]
        return [SPECIAL, *tokens] if add_special_tokens else tokens

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        adapters: Sequence[AdapterUse] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        if messages[0]["role"] == "unknown-role":
            raise InvalidField("messages: the chat template refuses", field="messages")
        text = "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)
        text += "[assistant]" if add_generation_prompt else ""
        text += str(template_kwargs) if template_kwargs else ""
        return await self.tokenize(text)

    async def render_chat_media(
        self,
        messages: list[dict[str, Any]],
        media: Sequence[Image | Audio | Video],
        adapters: Sequence[AdapterUse] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> MediaPrompt:
        """`[role]` and its parts, an item of media as `#####`."""
        tokens, items, left = [SPECIAL], [], list(media)
        for turn in messages:
            tokens += map(ord, f"[{turn['role']}]")
            for part in turn["content"]:
                if part["type"] == "text":
                    tokens += map(ord, part["text"])
                    continue
                item = left.pop(0)
                assert type(item).__name__.lower() == part["type"], "media are in order"
                span = (len(tokens), len(tokens) + len(part["type"]))
                items.append(MediaItem(part["type"], item.digest, (span,), {"decoded": item}))
                tokens += map(ord, "#" * len(part["type"]))
        assert not left, "each item of media has its part"
        tokens += map(ord, "[assistant]" if add_generation_prompt else "")
        tokens += map(ord, str(template_kwargs) if template_kwargs else "")
        return MediaPrompt(tuple(tokens), tuple(items))

    def decoder(self, adapters: Sequence[AdapterUse] = ()) -> Callable[[int], str]:
        return chr

    async def generate(
        self,
        request_id: str,
        prompt: Sequence[int] | MediaPrompt,
        params: SamplingParams | PoolingParams,
        adapters: Sequence[AdapterUse] = (),
        admitted: Callable[[Sequence[AdapterRef]], None] | None = None,
    ) -> AsyncIterator[Delta]:
        items: tuple[MediaItem, ...] = ()
        prompt_token_ids = prompt
        if isinstance(prompt, MediaPrompt):
            prompt_token_ids, items = prompt.token_ids, prompt.items
        self._admit(request_id, prompt_token_ids, params, adapters)
        self.seen_media.append(items)
        if admitted is not None:
            admitted([self.served[use.name] for use in adapters])
        if isinstance(params, PoolingParams):
            yield await self._pool(request_id, prompt_token_ids, params)
            return
        who = "+".join(f"{use.name}*{use.scale:g}" for use in adapters) or "base"
        text = "".join(chr(t) for t in prompt_token_ids if t != SPECIAL)
        answers = [f"<{who}> {index} {text[::-1]}" for index in range(params.n)]
        self.running += 1
        open_answers = set(range(params.n))
        cached = len(prompt_token_ids) // 2
        try:
            position = 0
            while open_answers:
                error = await self._tick(position)
                for index in sorted(open_answers):
                    delta = _delta(request_id, index, answers[index], position, params, cached)
                    if error is not None:
                        delta = Delta(request_id, index, finish_reason="error", error=error)
                    if delta.finished:
                        open_answers.discard(index)
                    yield delta
                position += 1
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _pool(
        self, request_id: str, prompt_token_ids: Sequence[int], params: PoolingParams
    ) -> Delta:
        """The embedding of a prompt is its tokens; it has as many classes."""
        self.running += 1
        try:
            if (error := await self._tick(0)) is not None:
                return Delta(request_id, 0, finish_reason="error", error=error)
            values = array("f", [token / 3 for token in prompt_token_ids[: params.dimensions]])
            labels = tuple(f"is-{chr(token)}" for token in prompt_token_ids)
            pooled = PoolingOutput(values, labels if params.task == "classify" else ())
            return Delta(request_id, 0, finish_reason="stop", pooled=pooled, num_cached_tokens=1)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _admit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        adapters: Sequence[AdapterUse],
    ) -> None:
        if self.stopping or self.failure:
            raise EngineStopped("the engine is stopping")
        if self.refuse_with is not None:
            raise self.refuse_with
        for use in adapters:
            if use.name not in self.served:
                raise UnknownModel(f"no adapter {use.name!r}", field="model")
        assert request_id not in self.request_ids, "request ids are unique"
        self.request_ids.append(request_id)
        self.seen.append((params, tuple(adapters), list(prompt_token_ids)))

    async def _tick(self, position: int) -> LoramuxError | None:
        """Wait for one token's time; the error to end with, if there is one."""
        deadline = time.monotonic() + self.delay_s
        await asyncio.sleep(0)
        while not self._ended and time.monotonic() < deadline:
            await asyncio.sleep(min(self.delay_s, 0.01))
        if self._ended:
            return EngineStopped("the engine stopped before the answer was complete")
        if self.fail_at is not None and position >= self.fail_at:
            return self.fail_with or EngineStopped("failed on purpose")
        return None

    async def add_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        self._check_expected(name, expected_digest)
        if name in self.config.model_names:
            raise AdapterExists(f"{name!r} is the base model", field="lora_name")
        if name in self.served and not load_inplace:
            raise AdapterExists(f"{name!r} is served already", field="lora_name")
        if name in self.loading:
            raise AdapterExists(f"{name!r} is being loaded by another call", field="lora_name")
        self.loading.add(name)
        try:
            await asyncio.sleep(self.load_delay_s)
        finally:
            self.loading.discard(name)
        if not os.path.isdir(path):
            raise AdapterNotFound(f"there is no folder {path!r}", field="lora_path")
        if not os.path.exists(os.path.join(path, "adapter_model.safetensors")):
            raise AdapterRejected(name, ["adapter_model.safetensors is missing", "no weights"])
        ref = reference(name, path)
        self.served[name] = ref
        self.pinned = self.pinned | {name} if pinned else self.pinned
        for callback in self._on_load:
            callback(ref, 0.5)
        return ref

    async def add_adapters(self, sources: Sequence[tuple[str, str]]) -> AsyncIterator[AdapterRef]:
        for name, path in sources:
            yield await self.add_adapter(name, path)

    async def push_adapter(
        self,
        name: str,
        config: bytes,
        weights: AsyncIterator[bytes],
        *,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        self._check_expected(name, expected_digest)
        self.received = (config, b"".join([piece async for piece in weights]))
        self.served[name] = reference(name, hashlib.sha256(self.received[1]).hexdigest())
        return self.served[name]

    def _check_expected(self, name: str, expected: str | None) -> None:
        current = self.served[name].digest if name in self.served else None
        if expected is not None and not (current or "none").startswith(expected):
            raise AdapterConflict("another version", current_digest=current)

    async def remove_adapter(
        self, name: str, *, drain_s: float | None = None, expected_digest: str | None = None
    ) -> Unloaded:
        self._check_expected(name, expected_digest)
        if name not in self.served:
            raise AdapterNotFound(f"{name!r} is not served", field="lora_name")
        return Unloaded(self.served.pop(name), freed=drain_s is not None)

    async def pin_adapter(self, name: str, pinned: bool = True) -> AdapterRef:
        if name not in self.served:
            raise AdapterNotFound(f"{name!r} is not served", field="lora_name")
        self.pinned = self.pinned | {name} if pinned else self.pinned - {name}
        return self.served[name]

    def residency(self) -> list[AdapterStatus]:
        return [replace(s, pinned=s.ref.name in self.pinned) for s in self.adapters()]

    async def adapter_events(self) -> AsyncIterator[list[AdapterEvent] | None]:
        yield []
        for batch in self.events:
            yield batch

    def adapters(self) -> list[AdapterStatus]:
        return [
            AdapterStatus(ref, users=0, on_host=True, on_device=ref.name == "alpha")
            for ref in self.served.values()
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.running,
            blocks_total=100,
            blocks_used=25,
            memory={"weights": 700, "kv_cache": 900},
            adapters=self.adapters(),
            tenants=[TenantStatus("alpha", 2, 3, 400), TenantStatus("gone", 0, 0, 5)],
        )

    def on_load(self, callback: Callable[[AdapterRef, float], None]) -> None:
        self._on_load.append(callback)


def _delta(
    request_id: str, index: int, answer: str, position: int, params: SamplingParams, cached: int
) -> Delta:
    """One character; the last one, a stop string or max_tokens ends the answer."""
    character = answer[position]
    so_far = answer[: position + 1]
    reason, stop = None, next((s for s in params.stop if so_far.endswith(s)), None)
    text = character
    if stop is not None:
        reason, text = "stop", ""
    elif position + 1 == len(answer):
        reason = "stop"
    elif position + 1 == params.max_tokens:
        reason = "length"
    logprobs = None
    if params.logprobs is not None:
        chosen = TokenLogprob(ord(character), -0.5, 1, character)
        top = tuple(
            TokenLogprob(ord("z") - k, -0.5 - k if k else float("-inf"), k + 1)
            for k in range(params.logprobs)
        )
        logprobs = (TokenLogprobs(chosen, top),)
    return Delta(
        request_id,
        index,
        text=text,
        token_ids=(ord(character),),
        logprobs=logprobs,
        finish_reason=reason,  # type: ignore[arg-type]
        stop_reason=stop,
        num_cached_tokens=cached,
    )
