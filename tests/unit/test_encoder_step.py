"""The encoder's own step, with towers that only count: what is kept, laid over rows, and told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.encoder_cache import Encode
from loramux.engine.encoder_step import EncoderStep, last_keys, positions_of
from loramux.engine.plan import Row, RowMedia, StepPlan
from loramux.layers.batch import UniformLoRA
from loramux.types import MediaItem

CPU = torch.device("cpu")


class FakeTowers:
    """Vectors that tell the item, the adapters and their own place: [1, n, 3]."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.broken: set[str] = set()

    def encode(
        self, items: Sequence[MediaItem], loras: Sequence[UniformLoRA | None]
    ) -> list[torch.Tensor]:
        self.calls.append([item.digest for item in items])
        if self.broken.intersection(self.calls[-1]):
            raise ValueError("no such shape")
        found = []
        for item, lora in zip(items, loras, strict=True):
            rank = 0 if lora is None else sum(lora.ranks)
            rows = [[float(item.digest), float(rank), float(i)] for i in range(item.num_vectors)]
            found.append(torch.tensor([rows]))
        return found


def encode(digest: str, size: int, *members: tuple[int, float]) -> Encode:
    return Encode(f"k{digest}", MediaItem("image", digest, ((0, size),), {}), members)


def row(start: int, count: int, media: RowMedia | None = None, shift: int = 0) -> Row:
    return Row(start, tuple(range(count)), start, (0,), (), None, shift, media)


def make_step() -> tuple[EncoderStep, FakeTowers]:
    towers = FakeTowers()
    fake: Any = towers
    return EncoderStep(fake, {0: 4, 4: 8}), towers


def test_vectors_are_laid_where_their_tokens_stand() -> None:
    step, towers = make_step()
    rows = (
        row(0, 3),
        row(5, 4, RowMedia((("k7", 1, 2, 1),))),
        row(9, 5, RowMedia((("k8", 0, 1, 0), ("k7", 3, 2, 3)))),
    )
    plan = StepPlan(rows, (encode("7", 5, (0, 1.0)), encode("8", 1)))
    assert step.run(plan) == {}
    assert towers.calls == [["8", "7"]]
    media = step.media(rows, CPU)
    assert media is not None and media.overlay is not None
    found = dict(zip(media.overlay.rows.tolist(), media.overlay.vectors[0].tolist(), strict=True))
    assert found == {
        4: [7, 4, 1],
        5: [7, 4, 2],
        7: [8, 0, 0],
        10: [7, 4, 3],
        11: [7, 4, 4],
    }
    assert media.positions is None and media.last_keys is None
    assert step.media((row(0, 3),), CPU) is None


def test_one_broken_item_is_told_and_the_others_are_there() -> None:
    step, towers = make_step()
    towers.broken = {"7"}
    rows = (row(0, 2, RowMedia((("k7", 0, 2, 0),))), row(4, 2, RowMedia((("k8", 0, 2, 0),))))
    plan = StepPlan(rows, (encode("7", 2), encode("8", 2)))
    failed = step.run(plan)
    assert list(failed) == ["k7"] and "no such shape" in str(failed["k7"])
    media = step.media(rows, CPU)
    assert media is not None and media.overlay is not None
    assert media.overlay.rows.tolist() == [2, 3]


def test_a_step_that_counted_on_a_broken_item_is_told_too() -> None:
    """It was planned before anybody had read that the item is broken."""
    step, towers = make_step()
    towers.broken = {"7"}
    rows = (row(0, 2, RowMedia((("k7", 0, 2, 0),))),)
    step.run(StepPlan(rows, (encode("7", 2),)))
    assert "no such shape" in str(step.run(StepPlan(rows))["k7"])
    towers.broken = set()
    assert step.run(StepPlan(rows, (encode("7", 2),), ("k7",))) == {}
    assert "bug" in str(step.run(StepPlan(rows, (), ("k7",)))["k7"])


def test_large_steps_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.engine.encoder_step.MOST_ENCODED", 5)
    step, towers = make_step()
    given = [encode("1", 3), encode("2", 3, (0, 1.0)), encode("3", 2), encode("4", 9)]
    step.run(StepPlan((), tuple(given)))
    assert towers.calls == [["1", "3"], ["4"], ["2"]]


def test_positions_in_three_dimensions_go_on_behind_the_prompt() -> None:
    known = np.array([[0, 1, 1, 5], [0, 1, 2, 5], [0, 2, 1, 5]], dtype=np.int32)
    media = RowMedia(positions=known)
    rows = (row(7, 1, shift=-2), row(2, 4, media, shift=2))
    found = positions_of(rows)
    assert found is not None
    assert found.tolist() == [[5, 1, 5, 6, 7], [5, 2, 5, 6, 7], [5, 1, 5, 6, 7]]
    assert positions_of((row(7, 1, shift=-2),)) is None


def test_tokens_of_an_image_see_its_last_key() -> None:
    rows = (row(3, 2), row(10, 6, RowMedia(whole=((1, 4, 15),))))
    found = last_keys(rows)
    assert found is not None and found.tolist() == [3, 4, 10, 15, 15, 15, 14, 15]
    assert last_keys(rows[:1]) is None
