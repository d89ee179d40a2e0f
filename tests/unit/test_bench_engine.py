"""`loramux bench decode | throughput --requests | load | kernels` on a model of two tiny layers.

What is measured here means nothing: the cores are shared with other tests.
"""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from loramux.bench import at_once, decode, kernels, load, main, prefill, profile
from loramux.bench.case import LINEARS
from loramux.bench.ceilings import Ceilings, StepFloor
from loramux.bench.geometry import geometry, write_model
from loramux.bench.jobs import EXIT_ALONE, Job, run, run_worker
from loramux.bench.linears import adapter_elements
from loramux.bench.process import BenchError
from loramux.bench.random_adapters import write_adapters
from loramux.bench.sitting import Sitting, _settings, worker_commands
from loramux.bench.system import News, open_ours
from loramux.bench.throughput import parse as parse_throughput

TINY = ["--geometry", "tiny"]
SMALL = [*TINY, "--rank", "4", "--input-len", "8"]
CEILINGS = Ceilings("NVIDIA H200", 4e12, 8e14, 5e10, 1e10)


class Echo:
    """A system in which every request gets one token a step, the first after a `delay` of steps."""

    def __init__(self, delay: int = 0):
        self.delay = delay
        self.adapters: list[int | None] = []
        self._left: dict[str, list[int]] = {}

    def register(self, adapters: Sequence[str]) -> None: ...

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int, adapter: int | None
    ) -> None:
        self.adapters.append(adapter)
        self._left[request_id] = [self.delay * len(self._left), max_tokens]

    def step(self) -> list[News]:
        news = []
        for name, left in list(self._left.items()):
            if left[0]:
                left[0] -= 1
                continue
            left[1] -= 1
            news.append(News(name, 1, left[1] == 0))
            if not left[1]:
                del self._left[name]
        return news

    def cancel(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def place(self, adapter: int) -> str:
        return "?"

    def take_read_times(self) -> list[float]:
        return [0.002, 0.004, 0.003]

    def close(self) -> None: ...


def sitting(tmp_path: Path, workload: str, options: Any) -> Sitting:
    made = Sitting(workload, options, {}, tmp_path, {"machine": {}}, ceilings=CEILINGS)
    made.prepare()
    return made


def rows_of(job: Job) -> list[dict[str, Any]]:
    return [{**row, **job.marks, "system": "x"} for row in run(job, open_ours, print, 0.0)]


# --- geometry ------------------------------------------------------------------------------------


def test_geometries_are_named_and_may_have_fewer_layers() -> None:
    assert geometry("llama-3.1-8b").layers == 32
    assert geometry("llama-3.1-8b:4").layers == 4
    for wrong in ("gpt-5", "tiny:0", "tiny:x", "tiny:"):
        with pytest.raises(ValueError):
            geometry(wrong)


def test_the_folder_is_one_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = write_model(tmp_path / "model", geometry("llama-3.1-8b"))
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.vocab_size) == (32, 128256)
    assert config.rope_parameters["rope_theta"] == 500000.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("héllo 7")) == "héllo 7"
    assert tokenizer.eos_token_id == 2


def test_adapters_differ_and_have_pefts_names(tmp_path: Path) -> None:
    config = geometry("tiny").config
    paths = write_adapters(tmp_path, config, 3, 4, ("q_proj", "v_proj"), seed=1)
    loaded = [load_file(path / "adapter_model.safetensors") for path in paths]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert loaded[0][name].shape == (32, 4) and len(loaded[0]) == 2 * 2 * 2
    assert not any(loaded[0][name].equal(other[name]) for other in loaded[1:])
    count = sum(tensor.numel() for tensor in loaded[0].values())
    assert count == adapter_elements(config, 4, ("q_proj", "v_proj"))
    settings = json.loads((paths[0] / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]


def test_an_adapter_of_the_8b_geometry_is_84_megabytes() -> None:
    config = geometry("llama-3.1-8b").config
    assert 2 * adapter_elements(config, 16) == 83886080
    assert 2 * adapter_elements(config, 16, ("q_proj", "v_proj")) == 13631488


# --- floors --------------------------------------------------------------------------------------


def test_floor_of_a_decode_step() -> None:
    floor = StepFloor(geometry("llama-3.1-8b").config, CEILINGS)
    assert floor.layer_weights + floor.head_weights == 7504658432
    assert floor.kv_bytes_per_token == 131072
    bare = floor.decode_ms(1, 0, 0)
    assert bare == pytest.approx(1000 * 2 * 7504658432 / 4e12)
    assert floor.decode_ms(1, 0, 4_000_000_000) == pytest.approx(bare + 1)
    # With many rows it is the products that take time.
    assert floor.decode_ms(1024, 0, 0) == pytest.approx(1000 * 2 * 7504658432 * 1024 / 8e14)


def test_floor_of_a_load_and_ceiling_of_throughput() -> None:
    floor = StepFloor(geometry("llama-3.1-8b").config, CEILINGS)
    assert floor.load_ms(84_000_000, from_disk=False) == pytest.approx(1.68)
    assert floor.load_ms(84_000_000, from_disk=True) == pytest.approx(1.68 + 8.4)
    few, many = (floor.throughput_tok_s(512, 512, 128, batch, 0) for batch in (8, 512))
    assert few < many < 512 * 128 / (512 * 512 * 2 * floor.layer_weights / 8e14)


# --- what is counted -----------------------------------------------------------------------------


def test_only_steps_of_the_whole_batch_count() -> None:
    job = Job("decode", {}, [], {"vocab_size": 99}, options={"input_len": 3})
    echo = Echo(delay=2)  # the third sequence starts four steps late, so the first ends four early
    steps = decode.decode_once(echo, job, {"batch": 3, "adapters": 2}, 10, random.Random(0))
    assert len(steps) == 10 - 4 - 1  # between six tokens
    assert echo.adapters == [0, 1, 0]


def test_adapters_by_turns_and_by_zipf() -> None:
    dice = random.Random(0)
    assert at_once.assignment(0, 2, 1.0, dice) == [None, None]
    assert at_once.assignment(3, 5, None, dice) == [0, 1, 2, 0, 1]
    drawn = at_once.assignment(1000, 4000, 1.0, dice)
    counts = [drawn.count(k) for k in range(1000)]
    assert counts[0] > counts[4] > counts[50] and max(k for k in drawn if k is not None) > 500


def test_a_load_is_a_cold_request_less_a_warm_one() -> None:
    options = {
        **{"streams": 2, "loads": 3, "input_len": 2, "quiet_steps": 5, "host_cycle": 3, "seed": 0},
    }
    settings = {"max_model_len": 40}
    cases = [{"source": "page cache"}, {"source": "host"}]
    echo = Echo()
    adapters = [str(i) for i in range(8)]
    job = Job("load", settings, cases, {"vocab_size": 99}, adapters, options)
    rows = list(load.measure(job, echo, print))
    assert [row["source"] for row in rows] == ["page cache", "host"]
    assert [row["read_ms"] for row in rows] == [3.0, 3.0]
    assert all(
        row["load_ms"] == pytest.approx(row["ttft_ms"] - row["warm_ttft_ms"], abs=0.01)
        for row in rows
    )
    probed = [adapter for adapter in echo.adapters if adapter]
    assert probed[3:] == [1, 2, 3, 1, 2, 3, 1, 2, 3]  # cold, brought to the host, from the host


# --- plans ---------------------------------------------------------------------------------------


def test_decode_plans_one_engine_without_lora_and_one_with(tmp_path: Path) -> None:
    options = decode.parse([*SMALL, "--batches", "1", "4", "--adapters", "0,1,4"])
    plan = dict(decode.jobs(sitting(tmp_path, "decode", options)))
    assert list(plan) == ["lora-off", "max-loras-4"]
    assert "enable_lora" not in plan["lora-off"].settings
    with_lora = plan["max-loras-4"]
    assert with_lora.settings["max_loras"] == 4 and len(with_lora.adapters) == 4
    cases = [(case["batch"], case["adapters"]) for case in with_lora.cases]
    assert cases == [(1, 0), (1, 1), (4, 0), (4, 1), (4, 4)]


def test_decode_plans_an_engine_for_every_count_and_rank(tmp_path: Path) -> None:
    options = decode.parse(
        [*SMALL, "--batches", "8", "--adapters", "0", "1", "8", "--exact", "--ranks", "8:16,8:64"]
    )
    plan = dict(decode.jobs(sitting(tmp_path, "decode", options)))
    assert list(plan) == [
        *("lora-off", "max-loras-1", "max-loras-8", "rank-8-under-16", "rank-8-under-64")
    ]
    assert plan["rank-8-under-64"].settings["max_lora_rank"] == 64
    assert plan["rank-8-under-64"].marks["rank"] == 8


def test_ranks_are_planned_with_both_shardings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*SMALL, "--batches", "2", "--adapters", "0", "2", "--fully-sharded-loras"]
    with pytest.raises(SystemExit):
        decode.parse(line)
    assert "--tensor-parallel-size" in capsys.readouterr().err
    options = decode.parse([*line, "--tensor-parallel-size", "2"])
    made = sitting(tmp_path, "decode", options)
    plan = dict(decode.jobs(made))
    assert list(plan) == ["lora-off", "max-loras-2", "max-loras-2-fully"]
    assert all(job.settings["tensor_parallel_size"] == 2 for job in plan.values())
    fully = plan["max-loras-2-fully"]
    assert fully.settings["fully_sharded_loras"] and fully.marks["fully_sharded_loras"]
    assert "fully_sharded_loras" not in plan["max-loras-2"].settings
    one = StepFloor(made.config, CEILINGS).decode_ms(2, 10, 1000)
    assert made.floor().decode_ms(2, 10, 1000) == pytest.approx(one / 2)


def test_rows_are_compared_with_the_engine_without_lora(tmp_path: Path) -> None:
    made = sitting(tmp_path, "decode", decode.parse(SMALL))
    row = {"case": "decode", "system": "loramux", "batch": 8, "adapters": 0, "decode_ms": 4.0}
    made.take(decode.finish(made, {**row, "lora": "off"}))
    enabled = {**row, "adapters": 8, "decode_ms": 5.0, "lora": "enabled", "rank": 4}
    done = decode.finish(made, enabled)
    assert (done["added_ms"], done["ratio"]) == (1.0, 1.25)
    assert done["floor_added_ms"] >= 0


def test_many_adapters_wait_on_the_host(tmp_path: Path) -> None:
    options = parse_throughput(
        [*SMALL, "--requests", "4", "--adapters", "0", "100", "--max-loras", "8"]
    )
    assert (options.runs, options.output_len) == (1, 128)
    plan = dict(at_once.jobs(sitting(tmp_path, "throughput", options)))
    settings = plan["adapters-100"].settings
    assert (settings["max_loras"], settings["max_cpu_loras"]) == (8, 100)


def test_a_geometry_has_no_weights_for_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_throughput(TINY)
    assert "--requests" in capsys.readouterr().err


def test_vllm_needs_its_script_and_its_interpreter(tmp_path: Path) -> None:
    assert list(worker_commands(decode.parse(TINY))) == ["loramux"]
    with pytest.raises(ValueError, match="vllm-python"):
        worker_commands(decode.parse([*TINY, "--systems", "vllm"]))
    there = [*TINY, "--vllm-python", "python"]
    with pytest.raises(ValueError, match="does not hold"):
        worker_commands(decode.parse([*there, "--peers", str(tmp_path)]))
    peers = str(Path(__file__).parents[2] / "bench" / "peers")
    assert list(worker_commands(decode.parse([*there, "--peers", peers]))) == ["loramux", "vllm"]


def test_the_header_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    model, output = str(tmp_path / "m"), str(tmp_path / "results")
    argv = ["--model", model, "--output", output]
    settings = _settings("decode", decode.parse(argv), argv)
    assert settings["command"] == "loramux bench decode --model m --output results"
    assert str(tmp_path) not in json.dumps(settings)


# --- on an engine --------------------------------------------------------------------------------


def test_decode_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batches", "1", "2", "--adapters", "0", "2", "--repeats", "1", "--output-len", "6"]
    assert main(["decode", *SMALL, *sizes, "--dora", "--sums", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-decode.jsonl")
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["kind"] == "header" and "loramux bench decode" in head["settings"]["command"]
    assert [row["case"] for row in rows[:2]] == ["ceilings", "start"]
    found = [
        (r["batch"], r["adapters"], r["lora"], "dora" in r)
        for r in rows
        if r["case"] == "decode" and "members" not in r
    ]
    assert [(r["batch"], r["adapters"]) for r in rows if r.get("members") == 2] == [(2, 2)]
    assert found == [
        *((1, 0, "off", False), (2, 0, "off", False)),
        *((1, 0, "enabled", False), (2, 0, "enabled", False), (2, 2, "enabled", False)),
        (2, 2, "enabled", True),
    ]
    assert all(row["decode_ms"] > 0 for row in rows if row["case"] == "decode")
    assert "floor" in capsys.readouterr().out


def test_prefill_is_read_beside_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batches", "2", "--adapters", "0", "2", "16", "--repeats", "1", "--output-len", "6"]
    made = sitting(tmp_path, "decode", decode.parse([*SMALL, *sizes, "--prefill-tokens", "64"]))
    plan = dict(decode.jobs(made))
    settings = plan["lora-off"].settings
    assert settings["max_num_batched_tokens"] == 64 and settings["max_num_seqs"] == 8
    assert plan["max-loras-16"].cases[-1] == {"prefill": 64, "adapters": 2}  # 16 need 16 prompts
    for job in plan.values():
        for row in rows_of(job):
            made.take(decode.finish(made, row))
    rows = made.of("prefill")
    assert [(row["lora"], row["adapters"]) for row in rows] == [
        *(("off", 0), ("enabled", 0), ("enabled", 2))
    ]
    assert "ratio" not in rows[0] and rows[2]["ratio"] > 0
    prefill.show_table(made)
    assert "8 prompts at once" in capsys.readouterr().out


def test_throughput_of_requests_at_once(tmp_path: Path) -> None:
    words = "--requests 6 --adapters 3 --output-len 4 --zipf 1 --max-loras 2 --targets q_proj"
    options = parse_throughput([*SMALL, *words.split()])
    made = sitting(tmp_path, "throughput", options)
    ((_, job),) = at_once.jobs(made)
    *_, row = rows_of(job)
    assert row["throughput_tok_s"] > 0 and row["targets"] == ["q_proj"] != list(LINEARS)
    made.take(at_once.finish(made, row))
    at_once.show_table(made)


def test_load_finds_adapters_where_it_wants_them(tmp_path: Path) -> None:
    words = "--streams 2 --loads 2 --quiet-steps 5 --max-loras 2"
    made = sitting(tmp_path, "load", load.parse([*SMALL, *words.split()]))
    rows = [row for row in rows_of(load.make_job(made)) if row["case"] == "load"]
    assert [row["places"] for row in rows] == [["disk"], ["host"]]
    for row in rows:
        made.take(load.finish(made, row))
    load.show_table(made)


def test_kernels_cover_every_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--batches 2 --adapters 2 --rank 4 --repeats 1"
    made = sitting(tmp_path, "kernels", kernels.parse([*TINY, *words.split()]))
    rows = rows_of(kernels.make_job(made))
    ops = [(row["linear"], row["op"]) for row in rows if row["case"] == "kernel"]
    wanted = [*kernels.PLAIN, *kernels.WITH_LORA]
    assert ops == [(linear, op) for linear in kernels.MERGED for op in wanted]
    assert {row["way"] for row in rows if row["case"] == "step"} == set(kernels.WAYS)
    for row in rows:
        made.take(kernels.finish(made, row))
    kernels.show_table(made)
    assert "gate_up" in capsys.readouterr().out


def test_profile_covers_every_kind_of_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--batches 1 2 --adapters 0 2 --prefill-tokens 64 --input-len 16 --steps 4"
    made = sitting(tmp_path, "profile", profile.parse([*SMALL, *words.split()]))
    rows = [row for row in rows_of(profile.make_job(made)) if row["case"] == "profile"]
    steps = [("decode", 1, 0), ("decode", 2, 0), ("decode", 2, 2), ("prefill", 64, 0)]
    found = {(row["step"], row["tokens"], row["adapters"]) for row in rows}
    assert found == {*steps, ("prefill", 64, 2)}
    assert all(row["us"] >= 0 for row in rows) and len({row["kernel"] for row in rows}) > 3
    for row in rows:
        made.take(row)
    profile.show_table(made)
    assert "prefill 64, 2 LoRAs" in capsys.readouterr().out


def test_time_belongs_to_the_kernel_that_started_last_or_to_nobody() -> None:
    spans = [("b<2>(x)", 4.0, 9.0), ("void a<1>()", 0.0, 5.0), ("a", 12.0, 13.0)]
    assert profile.by_kernel(spans) == [
        ("a", 5.0, 2), ("b", 5.0, 1), (profile.IDLE, 3.0, 1),
    ]  # fmt: skip


def test_a_worker_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    job = Job("decode", {"model": "no-such-folder"}, [], {})
    made = sitting(tmp_path, "decode", decode.parse(TINY))
    command = worker_commands(made.options)["loramux"]
    with pytest.raises(BenchError, match="no-such-folder"):
        list(run_worker(command, job, tmp_path, "job", 60.0, print))


def test_a_worker_whose_driver_has_gone_leaves(tmp_path: Path) -> None:
    made = sitting(tmp_path, "decode", decode.parse(TINY))
    command = worker_commands(made.options)["loramux"]
    Job("decode", {"model": "no-such-folder"}, [], {}).write(tmp_path / "job.json")
    worker = subprocess.Popen([*command, str(tmp_path / "job.json")], stdin=subprocess.PIPE)
    worker.communicate(timeout=60)  # which ends its input
    assert worker.returncode == EXIT_ALONE


def test_vllm_is_driven_through_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with vLLM's signatures: cumulative token ids, external request ids."""
    asked: list[dict[str, Any]] = []

    class Engine:
        tokens = 0

        def add_request(
            self, name: str, prompt: Any, params: Any, lora_request: Any = None
        ) -> None:
            asked.append({"name": name, "prompt": prompt, "params": params, "lora": lora_request})

        def step(self) -> list[Any]:
            self.tokens += 1
            answer = SimpleNamespace(token_ids=[5] * self.tokens)
            return [SimpleNamespace(request_id="a", outputs=[answer], finished=self.tokens == 2)]

    vllm = SimpleNamespace(
        LLM=lambda **_: SimpleNamespace(llm_engine=Engine()),
        SamplingParams=lambda **words: words,
    )
    requests = SimpleNamespace(LoRARequest=lambda *words: words)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", requests)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    script = Path(__file__).parents[2] / "bench" / "peers" / "vllm_gpu.py"
    system = runpy.run_path(str(script))["open_vllm"]({"model": "m"})
    system.register(["folder"])
    system.submit("a", [7, 8], 2, 0)
    assert asked[0]["lora"] == ("adapter-0", 1, "folder")
    assert asked[0]["params"]["detokenize"] is False and asked[0]["params"]["ignore_eos"] is True
    assert [system.step(), system.step()] == [[News("a", 1, False)], [News("a", 1, True)]]
