"""Workloads, their adapters, the rows and the table; nothing here is timed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from loramux.bench import main
from loramux.bench.case import LINEARS, Case, linear_shapes, make_adapter
from loramux.bench.report import (
    OURS,
    PEFT,
    TRANSFORMERS,
    Row,
    header,
    make_row,
    result_path,
    table,
    write_results,
)
from loramux.bench.throughput import parse, takes, worker_commands
from loramux.bench.worker import Answer, one_run, warm_up

CONFIG: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 99,
}


def case(**changes: Any) -> Case:
    return Case(**{"model": "m", "concurrency": 3, "input_len": 5, "output_len": 7, **changes})


def row(system: str, adapters: int, tok_s: float) -> Row:
    runs = [{"tok_s": tok_s, "ttft_s": [0.1, 0.2]}]
    return make_row(
        system, concurrency=8, adapters=adapters, runs=runs, load_s=1.0, peak_rss_mib=900.0
    )


def test_case_survives_its_file(tmp_path: Path) -> None:
    written = case(adapters=("a", "b"))
    written.write(tmp_path / "case.json")
    assert Case.read(tmp_path / "case.json") == written


def test_prompts_are_new_in_every_run_and_the_same_again_next_time() -> None:
    assert case().prompts(1) == case().prompts(1)
    assert case().prompts(1) != case().prompts(2)
    assert [len(prompt) for prompt in case().prompts(1)] == [5, 5, 5]
    assert all(0 <= t < 99 for prompt in case(vocab_size=99).prompts(1) for t in prompt)


def test_adapters_go_round_robin_across_requests_and_runs() -> None:
    assert case().assignment(4) == [None] * 3
    assert case(adapters=("a", "b")).assignment(0) == [0, 1, 0]
    assert case(adapters=("a", "b")).assignment(1) == [1, 0, 1]


def test_warm_up_uses_every_adapter() -> None:
    used: set[int | None] = set()

    def generate(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        used.update(adapters)
        return Answer(len(prompts) * output_len)

    warm_up(generate, case(concurrency=3, adapters=tuple("abcdefgh")))
    assert used == set(range(8))


def test_a_run_reports_first_tokens_or_measures_them() -> None:
    lengths: list[int] = []

    def generate(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        lengths.append(output_len)
        return Answer(len(prompts) * output_len, [0.5] if len(lengths) == 1 else [])

    assert one_run(generate, case(), 1)["ttft_s"] == [0.5]
    assert len(one_run(generate, case(), 2)["ttft_s"]) == 1
    assert lengths == [7, 7, 1]


def test_a_run_with_too_few_tokens_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="2 tokens came out instead of 21"):
        one_run(lambda prompts, adapters, output_len: Answer(2), case(), 1)


def test_adapter_is_a_peft_folder_on_all_linears(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = make_adapter(tmp_path / "a", CONFIG, rank=4, seed=0)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert len(tensors) == 2 * len(LINEARS) * CONFIG["num_hidden_layers"]
    for name, (inputs, outputs) in linear_shapes(CONFIG).items():
        (a,) = (t for k, t in tensors.items() if _is(k, name, "A"))
        (b,) = (t for k, t in tensors.items() if _is(k, name, "B"))
        assert a.shape == (4, inputs) and b.shape == (outputs, 4)
        assert abs(b).max() > 0


def _is(key: str, linear: str, half: str) -> bool:
    return "layers.0." in key and key.endswith(f"{linear}.lora_{half}.weight")


def test_rows_are_medians() -> None:
    runs = [{"tok_s": t, "ttft_s": [t / 100]} for t in (10.0, 30.0, 20.0)]
    made = make_row("x", concurrency=1, adapters=0, runs=runs, load_s=0.0, peak_rss_mib=1.0)
    assert (made.tok_s, made.ttft_p50_ms, made.runs) == (20.0, 200.0, 3)
    assert made.tok_s_runs == [10.0, 30.0, 20.0]


def test_table_compares_with_the_peer_and_with_no_adapters() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    rows = [row(OURS, 0, 200), row(OURS, 8, 150), row(PEFT, 8, 30), row(TRANSFORMERS, 0, 100)]
    console.print(table(rows))
    text = console.export_text()
    assert "5.00 x" in text and "2.00 x" in text  # 150 over PEFT's 30, 200 over transformers' 100
    assert "25%" in text and "70%" in text  # 150 of 200; PEFT's 30 of transformers' 100


def test_results_file_starts_with_its_header(tmp_path: Path) -> None:
    path = result_path(tmp_path)
    write_results(path, header({"runs": 1}), [row(OURS, 0, 200)])
    head, first = (json.loads(line) for line in path.read_text().splitlines())
    assert head["kind"] == "header" and head["machine"]["cores"] >= 1
    assert {"torch", "transformers", "peft"} <= set(head["versions"])
    assert (first["system"], first["tok_s"]) == (OURS, 200)
    assert result_path(tmp_path) != path


def test_peft_takes_adapters_and_transformers_the_base() -> None:
    assert [takes(s, 0) for s in (OURS, PEFT, TRANSFORMERS)] == [True, False, True]
    assert [takes(s, 8) for s in (OURS, PEFT, TRANSFORMERS)] == [True, True, False]


def test_systems_need_their_scripts(tmp_path: Path) -> None:
    assert set(worker_commands(parse(["--model", "m"]))) == {OURS}
    with pytest.raises(ValueError, match="--peers"):
        worker_commands(parse(["--model", "m", "--systems", "peft"]))
    with pytest.raises(ValueError, match="does not hold"):
        worker_commands(parse(["--model", "m", "--peers", str(tmp_path)]))


def test_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["latency"]) == 2
    assert "no workload 'latency'" in capsys.readouterr().err
    assert main(["throughput", "--model", "no-such-folder"]) == 1
    assert "no-such-folder" in capsys.readouterr().err
