"""How kernels follow one another on a GPU: the next one is set up while the last one ends.

Ordinarily a kernel is launched when the one before it is done and its results are visible: 2 to 3
microseconds in which nothing runs, in a decode step some 300 times. With programmatic dependent
launch (compute capability 9.0 or higher; "Programmatic Dependent Launch" in NVIDIA's CUDA
programming guide) the next kernel's programs may start earlier, and `wait` for the results where
they need them. Between the start and `wait` a kernel may read only what no step writes (weights,
the adapter pool) or what was written before the last kernel that had no such permission, such as
the packed step; it writes nothing. Every program must come by `wait`, or a kernel could be done
before the one it follows.

And what a launch costs the host. Triton looks at every argument anew to find what it has compiled for
such: 30 to 110 us on a 2.1 GHz core, the most where adapters are among the arguments, and a step that
is not captured has up to twenty launches a layer. `launch` remembers what Triton found, by facts that
tell at least as much apart; facts of what stays, or stays for a step, are found once (`Known`).
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

Tensor = torch.Tensor  # looked up in every launch

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


def cdiv(count: int, size: int) -> int:
    """How many of `size` hold `count`; Triton's own takes 3 us outside a kernel."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`, which is positive."""
    return 1 << (count - 1).bit_length()


class Known(NamedTuple):
    """An argument of a kernel, and its facts."""

    value: Any
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, *values: Any) -> Known:
        """A tuple of them."""
        return cls(values, facts_of(values))


ABSENT = Known(None, ())
"""For a kernel that has no such argument."""

_LARGE = 1 << 31
_found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def facts_of(values: Iterable[Any]) -> tuple[Any, ...]:
    """All that Triton compiles different code for: the type of each value, of a pointer and of an
    integer whether 16 divides it, and which integers are 1."""
    facts: list[Any] = []
    add = facts.append
    for value in values:
        kind = type(value)
        if kind is int:
            large = not -_LARGE <= value < _LARGE
            add((large, value & 15) if large else 1 if value == 1 else 2 * (value & 15))
        elif isinstance(value, Tensor):
            add(value.dtype)
            add(value.data_ptr() & 15)
        elif isinstance(value, tuple):
            add(facts_of(value))
        else:
            add(kind)
    return tuple(facts)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    known: Known | None = ABSENT,
    **constants: Any,
) -> None:
    """Launch a Triton kernel on the device of its first argument, a tensor. `arguments`: all before its
    constants, but the last if `known` is that. `constants`: all but EARLY, and Triton's options; of one
    kernel always in one order."""
    device = arguments[0].get_device()
    key = (
        id(kernel), device, *constants.values(), facts_of(arguments),
        None if known is None else known.facts,
    )  # fmt: skip
    if known is not ABSENT:
        arguments = (*arguments, None if known is None else known.value)
    found = _found.get(key)
    if found is not None:
        compiled, behind = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *behind)
        return
    if "EARLY" in kernel.arg_names:
        constants |= early(arguments[0].device)
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:  # None: interpreted
        behind = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _found[key] = compiled, behind
