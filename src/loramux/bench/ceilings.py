"""What this device can do at all, measured; and the time that a step's bytes and products need.

A floor is not a prediction: it leaves out attention's arithmetic, launches and activations, so
nothing is faster, and how far one is above it is comparable between machines. Of a mixture of
experts it counts those that uniform routing is expected to touch (see `linears.py`): a step whose
tokens happen to share more of them may be faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loramux.bench.linears import linears, router_weights

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one device; a copy counts the bytes read and the bytes written."""

    device: str  # the GPU's name, or "cpu"
    copy_bytes_s: float
    gemm_flop_s: float
    to_device_bytes_s: float  # from pinned host memory; on a CPU a plain copy
    host_copy_bytes_s: float  # bytes copied, counted once

    @property
    def gpu(self) -> str | None:
        return None if self.device == "cpu" else self.device

    def as_row(self) -> dict[str, Any]:
        return {"case": "ceilings", **asdict(self)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Ceilings:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        return (
            f"{self.device}: copy {self.copy_bytes_s / 1e12:.3g} TB/s, "
            f"bf16 product {self.gemm_flop_s / 1e12:.3g} TFLOP/s, "
            f"host to device {self.to_device_bytes_s / 1e9:.3g} GB/s"
        )


def pick_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def touch(device: str) -> None:
    """Import torch and set the device up: seconds that every start takes."""
    import torch

    torch.zeros(1, device=pick_device(device))


def measure_ceilings(device: str = "auto") -> Ceilings:
    """Best of a few large copies and bf16 products; under a second on a GPU, 200 MB on a CPU."""
    import torch

    device = pick_device(device)
    on_gpu = device.startswith("cuda")
    copied, side = (2 << 30, 8192) if on_gpu else (64 << 20, 512)
    host_bytes = min(copied, 256 << 20)
    host_s = _copy_s(host_bytes, "cpu", "cpu")
    ceilings = Ceilings(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        copy_bytes_s=2 * copied / _copy_s(copied, device, device),
        gemm_flop_s=2 * side**3 / _product_s(side, device),
        to_device_bytes_s=host_bytes / (_copy_s(host_bytes, "cpu", device) if on_gpu else host_s),
        host_copy_bytes_s=host_bytes / host_s,
    )
    if on_gpu:
        torch.cuda.empty_cache()  # the engine wants the memory
    return ceilings


def _copy_s(num_bytes: int, source: str, target: str) -> float:
    """Seconds of one copy; from the host to a GPU out of pinned memory."""
    import torch

    here = torch.zeros(num_bytes, dtype=torch.uint8, device=source)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=target)
    if source != target:
        here = here.pin_memory()
    return best_s(lambda: there.copy_(here, non_blocking=True), target)


def _product_s(side: int, device: str) -> float:
    import torch

    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    return best_s(lambda: torch.mm(a, a), device)


def best_s(call: Callable[[], object], device: str) -> float:
    """Shortest of a few calls, after one that does not count."""
    import torch

    def timed() -> float:
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    timed()
    return min(timed() for _ in range(REPEATS))


@dataclass(frozen=True, slots=True)
class StepFloor:
    """What one step of a model must move and multiply."""

    config: dict[str, Any]
    ceilings: Ceilings
    itemsize: int = 2
    tensor_parallel_size: int = 1  # devices that share the work, and whose links cost nothing

    @property
    def layer_weights(self) -> int:
        """Weights of the linears of all layers that a token is multiplied with: the router, and of
        the experts as many as it goes through."""
        each = sum(linear.per_token * linear.weights for linear in linears(self.config).values())
        return self._layers * (router_weights(self.config) + each)

    def touched_weights(self, tokens: int) -> float:
        """Those that a step of `tokens` tokens is expected to read."""
        each = sum(
            linear.touched(tokens) * linear.weights for linear in linears(self.config).values()
        )
        return self._layers * (router_weights(self.config) + each)

    @property
    def head_weights(self) -> int:
        return int(self.config["hidden_size"]) * int(self.config["vocab_size"])

    @property
    def kv_bytes_per_token(self) -> int:
        kv_out = linears(self.config)["k_proj"].outputs
        return 2 * self._layers * kv_out * self.itemsize

    @property
    def _layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def adapter_bytes(self, r: int, targets: Sequence[str], batch: int, adapters: int) -> float:
        """Bytes that a step reads of `adapters` adapters of rank `r`, which `batch` tokens have in turn.

        On experts it is as many factors as each adapter's own tokens are expected to touch."""
        if not adapters:
            return 0
        tokens, more = divmod(batch, adapters)  # `more` adapters have one token more
        each: float = 0
        for name, linear in linears(self.config).items():
            if name in targets:
                pairs = (adapters - more) * linear.touched(tokens)
                pairs += more * linear.touched(tokens + 1)
                each += pairs * (linear.inputs + linear.outputs)
        return self._layers * r * each * self.itemsize

    def decode_ms(self, batch: int, context: float, adapter_bytes: float) -> float:
        """One decode step: the weights, K and V of `context` tokens a sequence, the adapters."""
        head = self.head_weights  # of the embedding only `batch` rows
        read, multiplied = self.touched_weights(batch) + head, self.layer_weights + head
        bandwidth, rate = self.ceilings.copy_bytes_s, self.ceilings.gemm_flop_s
        products = max(read * self.itemsize / bandwidth, 2 * multiplied * batch / rate)
        moved = batch * context * self.kv_bytes_per_token + adapter_bytes
        return 1000 * (products + moved / bandwidth) / self.tensor_parallel_size

    def throughput_tok_s(
        self, requests: int, input_len: int, output_len: int, batch: int, adapter_bytes: float
    ) -> float:
        """Output tokens/s if prefill ran at the product rate and decode at `decode_ms`."""
        rate = self.ceilings.gemm_flop_s
        prefill_s = requests * input_len * 2 * self.layer_weights / rate / self.tensor_parallel_size
        batch = min(batch, requests)
        steps = (output_len - 1) * requests / batch
        step_ms = self.decode_ms(batch, input_len + output_len / 2, adapter_bytes)
        return requests * output_len / (prefill_s + steps * step_ms / 1000)

    def load_ms(self, adapter_bytes: int, *, from_disk: bool) -> float:
        """An adapter to the device: one copy up and, out of the page cache, one copy before it."""
        seconds = adapter_bytes / self.ceilings.to_device_bytes_s
        if from_disk:
            seconds += adapter_bytes / self.ceilings.host_copy_bytes_s
        return 1000 * seconds
