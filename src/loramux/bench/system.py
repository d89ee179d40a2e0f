"""A system under test as the workloads drive it, one step at a time; ours here, vLLM's in bench/peers.

Needs only the standard library until `open_ours` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Chosen = int | tuple[int, ...] | None
"""An adapter, or several whose sum a request takes (of ours alone), or none."""


class News(NamedTuple):
    """What one step brought for one request."""

    request_id: str
    num_tokens: int
    finished: bool


class System(Protocol):
    """An engine with adapters 0, 1, ... in this process. Requests are greedy and ignore EOS."""

    def register(self, adapters: Sequence[str]) -> None:
        """Make the PEFT folders known, as adapters 0 and up."""

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, adapter: Chosen
    ) -> None: ...

    def step(self) -> list[News]:
        """One step; with overlapped steps what comes back may be of the step before."""

    def cancel(self, request_id: str) -> None: ...

    def place(self, adapter: int) -> str:
        """Where an adapter is: `device`, `host`, `disk`, or `?` for a system that does not say."""

    def take_read_times(self) -> list[float]:
        """Seconds that each adapter's files took to read, since the last call, if the system says."""

    def close(self) -> None: ...


class Ours:
    """loramux through its offline engine."""

    def __init__(self, settings: dict[str, Any]):
        from loramux.llm import LLM
        from loramux.types import AdapterUse, SamplingParams

        self._llm = LLM(**settings)
        self._read_times: list[float] = []
        if self._llm.engine.store is not None:
            self._llm.engine.store.on_load = lambda ref, seconds: self._read_times.append(seconds)
        self._use, self._params = AdapterUse, SamplingParams
        names = SamplingParams.__dataclass_fields__
        self._more: dict[str, Any] = {"detokenize": False} if "detokenize" in names else {}

    def register(self, adapters: Sequence[str]) -> None:
        from loramux.offline_arguments import LoRARequest

        for i, path in enumerate(adapters):
            self._llm.add_lora(LoRARequest(_name(i), i + 1, path))

    def submit(self, request_id: str, prompt: list[int], max_tokens: int, adapter: Chosen) -> None:
        params = self._params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **self._more)
        chosen = () if adapter is None else (adapter,) if isinstance(adapter, int) else adapter
        uses = [self._use(_name(one)) for one in chosen]
        self._llm.engine.submit(request_id, prompt, params, uses)

    def step(self) -> list[News]:
        deltas = self._llm.engine.step()
        if not deltas and self._llm.engine.has_requests:
            self._llm.engine.wait()  # returns at once unless all of them wait for something
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
        return [News(d.request_id, len(d.token_ids), d.finished) for d in deltas]

    def cancel(self, request_id: str) -> None:
        self._llm.engine.cancel(request_id)

    def place(self, adapter: int) -> str:
        for status in self._llm.engine.adapters():
            if status.ref.name == _name(adapter):
                return "device" if status.on_device else "host" if status.on_host else "disk"
        return "disk"

    def take_read_times(self) -> list[float]:
        times, self._read_times = self._read_times, []
        return times

    def close(self) -> None:
        self._llm.close()


def _name(adapter: int) -> str:
    return f"adapter-{adapter}"


def open_ours(settings: dict[str, Any]) -> System:
    return Ours(settings)
