"""How kernels follow one another on a GPU: the next one is set up while the last one ends.

Ordinarily a kernel is launched when the one before it is done and its results are visible: 2 to 3
microseconds in which nothing runs, in a decode step some 300 times. With programmatic dependent
launch (compute capability 9.0 or higher; "Programmatic Dependent Launch" in NVIDIA's CUDA
programming guide) the next kernel's programs may start earlier, and `wait` for the results where
they need them. Between the start and `wait` a kernel may read only what no step writes (weights,
the adapter pool) or what was written before the last kernel that had no such permission, such as
the packed step; it writes nothing. Every program must come by `wait`, or a kernel could be done
before the one it follows.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

CAPABILITY = (9, 0)
"""From here on GPUs can launch kernels early."""


@cache
def early(device: torch.device) -> dict[str, Any]:
    """The launch arguments of a kernel that may start before its predecessor is done."""
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return {"EARLY": False}
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel before this one is done; and let the one behind this one start."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
