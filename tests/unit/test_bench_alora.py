"""`loramux bench alora` on a model of two tiny layers: which requests share what, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramux.bench import main

SMALL = ["alora", "--geometry", "tiny", "--device", "cpu", "--rank", "4", "--repeats", "2"]


def test_activated_adapters_find_the_conversation_and_plain_ones_do_not(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    argv = [*SMALL, "--input-len", "100", "--question-len", "5", "--output", str(output)]
    assert main([*argv, "--settings", '{"block_size": 16, "kv_cache_memory": "32MiB"}']) == 0
    head, *rows = map(json.loads, output.read_text().splitlines())
    assert head["kind"] == "header" and head["settings"]["input_len"] == 100
    assert head["settings"]["command"].startswith("loramux bench alora --geometry tiny")
    assert " --output rows.jsonl " in head["settings"]["command"]
    found = {(row["case"], row["adapter"]): row for row in rows}
    assert len(found) == len(rows) == 7
    for (case, adapter), row in found.items():
        assert row["ttft_ms"] > 0 and row["repeats"] == 2
        assert row["prompt_tokens"] == (108 if adapter else 100)
        assert row["cached_tokens"] == (96 if case == "activated" else 0)
        assert ("plain_over_activated" in row) == (case == "activated")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--geometry", "tiny", "--input-len", "2048"], "takes 2048"),
        (["--geometry", "none"], "there is no geometry 'none'"),
    ],
)
def test_what_cannot_be_measured(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["alora", *argv]) == 2
    assert word in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["alora", "--adapters", "0"])
