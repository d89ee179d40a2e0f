"""The compiled CPU library as ctypes sees it: one handle that keeps Python's lock, one that lets go."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from loramux.kernels.cpu_build import Libraries, library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES = {
    "loramux_lora_delta": [_P, _P, _P, _I, _P, _I, _I, _I, _I],
    "loramux_attention": [_P],
    "loramux_write_kv": [_P, _I, _I, _P, _I, _I, _P, _I, _I, _P, _I, _I, _P, _I, _I, _I, _I],
    "loramux_rms_norm": [_P, _I, _P, _I, _P, _P, _P, _I, _I, _D, _I, _I, _I],
    "loramux_silu_mul": [_P, _I, _P, _I, _P, _I, _I, _I, _I],
    "loramux_rope": [_P, _I, _I, _I, _P, _I, _I, _I, _P, _I, _P, _I, _I, _I, _I, _I],
}


def _with_signatures(libraries: Libraries | None) -> tuple[Any, Any]:
    if libraries is None:
        raise ImportError("the CPU kernels are not available")
    for name, types in SIGNATURES.items():
        for handle in (libraries.holding, libraries.releasing):
            getattr(handle, name).argtypes = types
            getattr(handle, name).restype = ctypes.c_int
    return libraries.holding, libraries.releasing


holding, releasing = _with_signatures(library())
