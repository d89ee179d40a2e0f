"""The numbers of an adapter: finite, and fit for the data types that they are served in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from loramux.adapters.report import summarise
from loramux.adapters.weights import Stored


def check_values(
    buffer: torch.Tensor,
    stored: Mapping[str, Stored],
    dtype: torch.dtype,
    row_keys: Collection[str],
    row_dtype: torch.dtype,
) -> list[str]:
    """Reasons against values that are not finite, or would not be in `dtype`; in `row_dtype` those of
    `row_keys`.

    Tensors that stand side by side are looked at together, and one by one only to name the bad ones.
    """
    bad = []
    factors = {key: one for key, one in stored.items() if key not in row_keys}
    rows = {key: one for key, one in stored.items() if key in row_keys}
    for some, kind in ((factors, dtype), (rows, row_dtype)):
        for keys in _side_by_side(some):
            first, last = some[keys[0]], some[keys[-1]]
            whole = buffer[first.offset : last.end].view(first.dtype)  # [elements]
            if _complaint(whole, kind):
                complaints = ((key, _complaint(some[key].view(buffer), kind)) for key in keys)
                bad += [f"{key} {complaint}" for key, complaint in complaints if complaint]
    return summarise(sorted(bad))


def _side_by_side(stored: Mapping[str, Stored]) -> Iterator[list[str]]:
    """The keys, in runs of tensors of one data type without a gap."""
    run: list[str] = []
    for key, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
        before = stored[run[-1]] if run else tensor
        if run and (tensor.offset, tensor.dtype) != (before.end, before.dtype):
            yield run
            run = []
        run.append(key)
    if run:
        yield run


def _complaint(values: torch.Tensor, dtype: torch.dtype) -> str:
    """The extremes tell: NaN spreads into them, and rounding keeps the order of what it rounds."""
    extremes = torch.stack(torch.aminmax(values))  # [2]
    if not bool(extremes.isfinite().all()):
        return "holds NaN or infinity"
    if not bool(extremes.to(dtype).isfinite().all()):
        return f"overflows in {dtype}; serve it with --lora-dtype float32"
    return ""
