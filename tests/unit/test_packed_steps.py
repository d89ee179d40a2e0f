"""The GPU's runner on a CPU, without graphs: packed steps and work lists give the same answers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config.graphs import row_buckets
from loramux.engine import engine as engine_module
from loramux.engine.gpu_runner import GpuRunner
from loramux.engine.lora_choice import LoRAChooser
from loramux.engine.packing import (
    Capacity,
    PackedStep,
    Run,
    decodes_first,
    fill,
    leading_decodes,
    runs_of,
)
from loramux.engine.plan import PENDING, Row, SampleSpec
from tiny import VOCAB, save_adapter, save_model

SETTINGS = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 8, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "c": {"r": 2, "lora_alpha": 3, "rank_pattern": {"o_proj": 5}},
}
WISHES: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 1.0}, {}, {"a": 0.5, "c": 1.0}, {"c": -1.0}]


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "model", request.param)
    paths = {
        n: save_adapter(model, root / n, seed=i, **s) for i, (n, s) in enumerate(SETTINGS.items())
    }
    return model, paths


def answers(model: Path, paths: dict[str, Path], **settings):
    llm = LLM(
        str(model),
        enable_lora=True,
        max_loras=3,
        max_lora_rank=8,
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
        **settings,
    )
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(3, 40))] for _ in WISHES]
    wishes = [
        [LoRARequest(name, lora_path=str(paths[name]), scale=scale) for name, scale in wish.items()]
        for wish in WISHES
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, lora_request=wishes)
    llm.engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs], llm


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("lora_dtype", ["auto", "bfloat16"])
def test_packed_steps_answer_as_the_cpu_runner(world, monkeypatch, ahead: bool, lora_dtype: str):
    model, paths = world
    expected, _ = answers(model, paths, lora_dtype=lora_dtype, max_num_batched_tokens=48)
    monkeypatch.setattr(engine_module, "make_runner", GpuRunner)
    got, llm = answers(
        model, paths, lora_dtype=lora_dtype, max_num_batched_tokens=48, async_scheduling=ahead
    )
    assert isinstance(llm.engine.runner, GpuRunner)
    assert llm.engine.runner.attached.sites[0].extends_product == (lora_dtype == "auto")
    # Half-width adapters round their inner activations, where the CPU does not.
    count = None if lora_dtype == "auto" else 2
    assert [tokens[:count] for tokens in got] == [tokens[:count] for tokens in expected]


class Cheap:
    """Costs that always favour one of the two ways."""

    def __init__(self, product: float, kernel: float):
        self.product, self.kernel = product, kernel

    def in_product(self, tokens: int, rows: int) -> float:
        return self.product

    def in_kernel(self, tokens: int, rows: int) -> float:
        return self.kernel


def test_the_product_takes_along_no_more_rows_than_it_must():
    runs = [Run(0, 1, ()), Run(1, 2, ((0, 1.0),)), Run(2, 3, ((20, 1.0), (8, 0.5)))]
    ranks = {0: 8, 8: 8, 20: 5}
    choice = LoRAChooser(row_buckets(64), Cheap(1, 2)).choose(runs, ranks, 3)
    assert choice.base_rows == 32
    assert choice.columns[((20, 1.0), (8, 0.5))] == [20, 8]
    pooled = LoRAChooser(row_buckets(64), Cheap(2, 1)).choose(runs, ranks, 3)
    assert pooled.base_rows == 0 and pooled.width == 13
    assert pooled.columns[((20, 1.0), (8, 0.5))] == [0, 5]
    assert LoRAChooser([], Cheap(1, 2)).choose(runs, ranks, 3).base_rows == 0


def row(sequence: int, tokens: tuple[int, ...], start: int, table: tuple[int, ...], members=()):
    spec = SampleSpec(SamplingParams(), seed=0, position=0)
    return Row(sequence, tokens, start, table, members, spec if sequence % 2 else None)


def test_a_packed_step_says_what_its_rows_say():
    rows = [
        row(1, (5,), 17, (3, 9)),
        row(2, (7, 8, 9), 0, (4,)),
        row(3, (PENDING,), 15, (2,), ((16, 0.5),)),
    ]
    packed = PackedStep(Capacity(16, 8, 8, 32), torch.device("cpu"))
    host = packed.next_host()
    shape = fill(
        *(packed, host, rows, 16),
        previous={3: 6},
        columns={((16, 0.5),): [16]},
        ranks={16: 8},
        rows_per_chunk=2,
    )
    arrays = packed.arrays(host)
    assert shape.tokens == 5 and shape.sequences == 3 and shape.kept == 2 and shape.chunks == 3
    assert arrays["ids"][:5].tolist() == [5, 7, 8, 9, 0]
    assert arrays["sources"][:5].tolist() == [-1, -1, -1, -1, 6]
    assert arrays["slots"][:5].tolist() == [9 * 16 + 1, 64, 65, 66, 2 * 16 + 15]
    assert arrays["keep"][:2].tolist() == [0, 4]
    assert arrays["page_starts"][:4].tolist() == [0, 2, 3, 4]
    assert arrays["pages"][:4].tolist() == [3, 9, 4, 2]
    assert arrays["last_page_lens"][:3].tolist() == [2, 3, 16]
    chunks = arrays["chunks"][:24].reshape(3, 8)
    half = int(np.float32(0.5).view(np.int32))
    wanted = [[0, 2, 0, 0], [2, 4, 0, 0], [4, 5, 0, 1]]
    assert chunks[:, :4].tolist() == wanted
    assert chunks[:, 4:].tolist() == [[0] * 4, [0] * 4, [16, 16, half, 8]]
    assert arrays["member_ranks"][0] == 8
    assert arrays["counts"].tolist() == [2, 3]
    assert np.isclose(arrays["member_scales"][0], 0.5)


def test_rows_of_one_token_come_first_where_there_are_enough():
    long, short = row(1, (5, 6), 0, (1,)), [row(i, (4,), 9, (i,)) for i in range(2, 6)]
    mixed = [short[0], long, *short[1:]]
    assert list(decodes_first(mixed)) == [*short, long]
    assert leading_decodes([*short, long]) == 4 and leading_decodes(short) == 4
    assert list(decodes_first(mixed[:3])) == mixed[:3] and leading_decodes(mixed[:3]) == 0
    packed = PackedStep(Capacity(16, 8, 8, 32), torch.device("cpu"))
    host = packed.next_host()
    fill(
        *(packed, host, [*short, long], 16),
        previous={}, columns={}, ranks={}, rows_per_chunk=8, decodes=4,
    )  # fmt: skip
    assert packed.arrays(host)["prefill_starts"][:2].tolist() == [0, 2]
    assert packed.arrays(host)["query_starts"][:6].tolist() == [0, 1, 2, 3, 4, 6]


def test_padding_writes_nowhere_and_reads_one_position():
    rows = [row(1, (5,), 0, (3,))]
    packed = PackedStep(Capacity(8, 8, 8, 32), torch.device("cpu"))
    host = packed.next_host()
    shape = fill(
        *(packed, host, rows, 16), previous={}, columns={}, ranks={}, rows_per_chunk=16, pad_to=4
    )
    arrays = packed.arrays(host)
    assert shape.tokens == shape.sequences == shape.kept == 4
    assert arrays["slots"][:4].tolist() == [48, -1, -1, -1]
    assert arrays["context_lens"][:4].tolist() == [1, 1, 1, 1]
    assert arrays["page_starts"][:5].tolist() == [0, 1, 2, 3, 4]
    assert arrays["pages"][:4].tolist() == [3, 0, 0, 0]
    assert runs_of(rows) == [Run(0, 1, ())]
