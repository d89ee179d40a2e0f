"""Media that fail in the engine: their request ends, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loramux import LLM, SamplingParams
from loramux.errors import InvalidField
from loramux.media.in_memory import image_in_memory
from loramux.types import MediaItem, MediaPrompt
from parity.multimodal import FAMILIES, random_image, save_model

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 128,
    "max_num_batched_tokens": 24,
    "max_num_seqs": 4,
    "block_size": 8,
    "kv_cache_memory": "32MiB",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("media") / "model", "llava")


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), async_scheduling=request.param, **SETTINGS) as llm:
        yield llm


def prompt(llm: LLM, seed: int) -> MediaPrompt:
    text = f"see {FAMILIES['llava'].prompts['image']} here"
    return llm.engine.media.prepare(text, [image_in_memory(random_image(seed))])


def run(llm: LLM, prompts: list[MediaPrompt]) -> dict[str, tuple[list[int], Any]]:
    """By request: its tokens, and its error."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    found: dict[str, tuple[list[int], Any]] = {}
    for number, one in enumerate(prompts):
        llm.engine.submit(str(number), one, params)
        found[str(number)] = ([], None)
    while llm.engine.has_requests:
        for delta in llm.engine.step():
            tokens = found[delta.request_id][0] + list(delta.token_ids)
            found[delta.request_id] = (tokens, delta.error)
    llm.engine.check_integrity()
    return found


def test_only_the_requests_of_a_broken_image_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(llm, seed) for seed in (1, 2, 1, 3)]
    bad = prompts[0].items[0].digest
    towers: Any = llm.engine.runner.attached.towers
    encode = towers.encode

    def broken(items: Sequence[MediaItem], loras: Any) -> Any:
        if any(item.digest == bad for item in items):
            raise RuntimeError("the tower fell")
        return encode(items, loras)

    monkeypatch.setattr(type(towers), "encode", lambda self, *given: broken(*given))
    found = run(llm, prompts)
    for number in "02":
        assert "the tower fell" in str(found[number][1]) and found[number][0] == []
    assert found["1"][1] is None and found["3"][1] is None
    monkeypatch.undo()
    again = run(llm, prompts)  # nothing of the failed steps is in a cache
    assert all(error is None for _, error in again.values())
    assert again["0"] == again["2"]
    with LLM(str(llm.config.model), enable_prefix_caching=False, **SETTINGS) as fresh:
        assert again == run(fresh, prompts)


def test_media_that_are_too_large_for_the_engine_are_refused(folder: Path) -> None:
    refused = pytest.raises(InvalidField, match="16 tokens, and 8 are encoded")
    with LLM(str(folder), encoder_cache_tokens=8, **SETTINGS) as llm, refused:
        prompt(llm, 1)
