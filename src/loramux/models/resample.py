"""Sounds at another rate: band-limited interpolation with a sinc under a Kaiser window.

Each output sample is a weighted sum of the input around its time. The weights repeat after
`new / gcd(old, new)` outputs, so that many rows of them serve a sound of any length.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

ZEROS = 64  # zero crossings of the sinc on either side
ROLLOFF = 0.92  # of the lower of the two Nyquist frequencies: the middle of the filter's edge
BETA = 12.0  # of the window: aliases are more than 110 dB down
PHASES = 1024  # rows of weights at most; between them they are interpolated, to 1e-6
BLOCK = 1 << 22  # products at a time


def resample(samples: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """[S] at `rate` -> [ceil(S * new_rate / rate)] at `new_rate`; outside of it there is silence.

    Summed in float64. Frequencies up to 0.85 of the lower Nyquist frequency keep their amplitude to
    1e-5; those that `new_rate` cannot hold are removed.
    """
    if rate == new_rate:
        return samples
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    rows = _rows(old, new)  # [P + 1, taps]
    num_rows, num_taps = len(rows) - 1, rows.shape[1]
    count = -(-len(samples) * new // old)
    padded = np.pad(samples.astype(np.float64), num_taps // 2)  # [S + taps]
    windows = np.lib.stride_tricks.sliding_window_view(padded, num_taps)  # [S + 1, taps]
    out = np.empty(count, np.float32)  # [N]
    step = max(1, BLOCK // num_taps)
    for start in range(0, count, step):
        outputs = np.arange(start, min(start + step, count), dtype=np.int64)  # [n]
        before, phase = np.divmod(
            outputs * old, new
        )  # [n]: the input before, and how far behind it
        row, rest = np.divmod(phase * num_rows, new)  # [n]
        taps = windows[before + 1]  # [n, taps]: half of them up to `before`, half behind it
        total = np.einsum("nt,nt->n", taps, rows[row])  # [n]
        if num_rows < new:
            following = np.einsum("nt,nt->n", taps, rows[row + 1])  # [n]
            total += (following - total) * (rest / new)
        out[start : start + step] = total
    return out


@functools.lru_cache(maxsize=8)
def _rows(old: int, new: int) -> NDArray[np.float64]:
    """[P + 1, taps]: row i has the weights of an output i / P of an input sample behind an input."""
    num_rows = min(new, PHASES)
    cutoff = min(1.0, new / old) * ROLLOFF  # of the input's Nyquist frequency
    reach = math.ceil(ZEROS / cutoff) + 1  # inputs on either side that an output sees
    phases = np.arange(num_rows + 1)[:, None] / num_rows  # [P + 1, 1]
    distance = np.arange(1 - reach, reach + 1) - phases  # [P + 1, taps] in input samples
    inside = np.clip(1 - (distance * cutoff / ZEROS) ** 2, 0, None)  # [P + 1, taps]
    window = np.i0(BETA * np.sqrt(inside)) / np.i0(BETA) * (inside > 0)  # [P + 1, taps]
    return cutoff * np.sinc(distance * cutoff) * window  # [P + 1, taps]
