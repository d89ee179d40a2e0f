"""Sounds at another rate, against the same waves computed in float64 at that rate."""

from __future__ import annotations

import numpy as np
import pytest

from loramux.models.resample import resample

RATES = [(8000, 16000), (44100, 16000), (48000, 16000), (192000, 16000), (11025, 24000)]
ODD = [(44101, 16000), (15999, 16000)]  # more phases than rows of weights


def waves(rate: int, count: int, hertz: np.ndarray) -> np.ndarray:
    """float64 [count], a sum of sines of amplitude 1 / n."""
    seconds = np.arange(count) / rate
    return sum(np.sin(2 * np.pi * h * seconds + i) for i, h in enumerate(hertz)) / len(hertz)


@pytest.mark.parametrize(("old", "new"), RATES + ODD)
def test_what_both_rates_can_hold_stays(old: int, new: int) -> None:
    hertz = np.random.default_rng().uniform(20, 0.85 * min(old, new) / 2, 6)
    made = resample(waves(old, old // 2, hertz).astype(np.float32), old, new)
    assert made.dtype == np.float32 and len(made) == -(-(old // 2) * new // old)
    inside = slice(len(made) // 10, -len(made) // 10)  # beside it there is silence
    wanted = waves(new, len(made), hertz)
    np.testing.assert_allclose(made[inside], wanted[inside], atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [r for r in RATES + ODD if r[0] > r[1]])
def test_what_the_new_rate_cannot_hold_is_gone(old: int, new: int) -> None:
    hertz = np.random.default_rng().uniform(new / 2, old / 2, 3)
    made = resample(waves(old, old // 2, hertz).astype(np.float32), old, new)
    assert np.abs(made[len(made) // 10 : -len(made) // 10]).max() < 1e-5


def test_the_same_rate_changes_nothing() -> None:
    samples = np.random.default_rng().standard_normal(100).astype(np.float32)
    assert resample(samples, 16000, 16000) is samples


@pytest.mark.parametrize("count", [0, 1, 7])
def test_short_sounds_have_their_length(count: int) -> None:
    samples = np.ones(count, np.float32)
    assert len(resample(samples, 44100, 16000)) == -(-count * 160 // 441)
    assert len(resample(samples, 8000, 16000)) == 2 * count
