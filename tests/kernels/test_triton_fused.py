"""Norms, gates, rotation and cache writes in Triton, on the GPU or in the interpreter.

The value is that of the twins in float64; the bits are those of the twins, but for rare ties.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, NAN, STEP, assert_close, int32, strided
from work_lists import RANKS, Case, Span, expand_to, for_twins, in_float64, make_case, strided_to

from loramux.kernels import Activation, NormMode, reference

cuda = pytest.importorskip("loramux.kernels.cuda")

# The interpreter computes in numpy, which warns where exp(200) becomes infinite.
pytestmark = [
    pytest.mark.usefixtures("_grids"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODES: tuple[NormMode, ...] = ("llama", "plain", "gemma")
# Rows 0 and 27 to 29 are in no chunk: what becomes of them is nobody's business.
SPANS: list[Span] = [(1, 3, []), (3, 4, [2]), (4, 22, [5, 18]), (22, 24, [36, 64, 9]), (24, 27, [])]
TOKENS = 30
# The chains round in between: so many roundings, each of one step, may add up.
CHAIN = 3.0


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(starts: tuple[int, ...], dtype: torch.dtype = BF16, **options: Any) -> Case:
    return make_case(starts, RANKS, SPANS, TOKENS, dtype=dtype, **options)


def random_rows(width: int, dtype: torch.dtype, case: Case | None = None) -> torch.Tensor:
    """[T, width], NaN between the rows and in the rows of no chunk."""
    x = strided(TOKENS, width, dtype=dtype)
    if case is not None:
        x[~case.touched] = NAN
    return x


def same_bits(ours: torch.Tensor, theirs: torch.Tensor, ties: float = 3e-3) -> None:
    """But for the rare tie that sums in another order decide differently."""
    assert ours.dtype == theirs.dtype and ours.is_contiguous()
    if ours.dtype != F32:
        assert (ours != theirs).double().mean() <= ties


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [7, 64, 576, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype, size: int, mode: NormMode, device: str) -> None:
    weight = torch.randn(size).to(dtype)
    for x in (strided(5, size, dtype=dtype), strided(6, 3, size, dtype=dtype)):
        out = cuda.rms_norm(strided_to(x, device), weight.to(device), 1e-5, mode).cpu()
        assert_close(out, reference.rms_norm(x.double(), weight.double(), 1e-5, mode), CHAIN)
        same_bits(out, reference.rms_norm(x, weight, 1e-5, mode))
    four = torch.randn(2, 3, 2, size).to(dtype).transpose(1, 2)
    out = cuda.rms_norm(four.to(device), weight.to(device), 1e-5, mode).cpu()
    same_bits(out, reference.rms_norm(four, weight, 1e-5, mode).contiguous())


def check_add_norm(
    dtype: torch.dtype,
    size: int,
    mode: NormMode,
    device: str,
    case: Case | None = None,
    post: bool = False,
    weights: torch.dtype | None = None,
) -> None:
    x, residual = random_rows(size, dtype, case), random_rows(size, dtype, case)
    weight, second = (torch.randn(size).to(weights or dtype) for _ in range(2))
    before = strided_to(residual, device)
    out, total = cuda.add_rms_norm(
        strided_to(x, device),
        before,
        weight.to(device),
        1e-5,
        mode,
        second.to(device) if post else None,
        None if case is None else expand_to(case.expand, device),
    )
    assert torch.equal(before.cpu().nan_to_num(), residual.nan_to_num())
    wide, wide_total = reference.add_rms_norm(
        x.double(),
        residual.double(),
        weight.double(),
        1e-5,
        mode,
        second.double() if post else None,
        None if case is None else in_float64(case.expand),
    )
    twin, twin_total = reference.add_rms_norm(
        x,
        residual,
        weight,
        1e-5,
        mode,
        second if post else None,
        None if case is None else for_twins(case.expand),
    )
    kept = slice(None) if case is None else case.touched
    out, total = out.cpu()[kept], total.cpu()[kept]
    # A sum of rounded terms: the error goes with the terms, not with the sum.
    assert_close(total, wide_total[kept], CHAIN, floor=12 * STEP[dtype] + 4e-5)
    assert_close(out, wide[kept], 2 * CHAIN, floor=12 * STEP[dtype] + 4e-5)
    same_bits(total, twin_total[kept])
    same_bits(out, twin[kept], 2e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype, mode: NormMode, device: str) -> None:
    check_add_norm(dtype, 500, mode, device)
    check_add_norm(dtype, 96, mode, device, post=True)
    check_add_norm(dtype, 96, mode, device, post=True, weights=F32)


@pytest.mark.parametrize("rows, many", [(16, 1), (64, 1), (64, 1 << 30)])
@pytest.mark.parametrize(
    "activations, weights, mode, size, post, parts",
    [
        (BF16, BF16, "llama", 576, False, 1),
        (BF16, F32, "gemma", 576, True, 3),
        (F16, F16, "plain", 1536, True, 2),
        (F32, BF16, "llama", 72, False, 4),
        (F32, F32, "gemma", 64, True, 1),
    ],
)
def test_add_rms_norm_with_delta(
    activations: torch.dtype,
    weights: torch.dtype,
    mode: NormMode,
    size: int,
    post: bool,
    parts: int,
    rows: int,
    many: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`many` chunks are worth larger tiles."""
    monkeypatch.setattr("loramux.kernels.triton_norm.MANY_CHUNKS", many)
    starts = (0, size) if size != 72 else (0, 20, 72)
    case = make(starts, weights, parts=parts, rows_per_chunk=rows, untouched=((0, 9),))
    check_add_norm(activations, size, mode, device, case, post)
    if activations == BF16:
        check_add_norm(activations, size, mode, device, case, post, weights=F32)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(dtype: torch.dtype, activation: Activation, device: str) -> None:
    x = strided(5, 2 * 1536, dtype=dtype) * 4
    x[0, 0], x[1, 0] = -200.0, 200.0
    out = cuda.gated(strided_to(x, device), activation).cpu()
    assert_close(out, reference.gated(x.double(), activation), CHAIN, floor=2e-5)
    # Where 1 + tanh nearly cancels, torch's own gelu is off by more than a tie.
    steady = x[:, :1536] > -1 if activation == "gelu_tanh" else torch.ones_like(out).bool()
    same_bits(out[steady], reference.gated(x, activation)[steady], 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype, device: str) -> None:
    gate, up = strided(5, 600, dtype=dtype), strided(5, 600, dtype=dtype)
    out = cuda.silu_mul(strided_to(gate, device), strided_to(up, device)).cpu()
    assert_close(out, reference.silu_mul(gate.double(), up.double()), CHAIN)
    same_bits(out, reference.silu_mul(gate, up))


@pytest.mark.parametrize(
    "activations, weights, activation, starts, parts, rows",
    [
        (BF16, BF16, "silu", (0, 200, 400), 1, 16),
        (BF16, F32, "gelu_tanh", (0, 200, 400), 2, 16),
        (F16, F16, "silu", (0, 400), 4, 64),  # one slice for both
        (F32, BF16, "silu", (0, 384, 768), 8, 64),
        (F32, F32, "gelu_tanh", (0, 100, 300, 400), 1, 16),  # slices cut anywhere
        (BF16, BF16, "silu", (0, 384, 768), 1, 4),  # row by row from here on
        (F16, F32, "gelu_tanh", (0, 96, 192), 3, 4),
        (F32, BF16, "silu", (0, 512), 2, 2),
        (BF16, BF16, "silu", (0, 100, 300, 400), 1, 4),  # slices cut anywhere: products
    ],
)
def test_gated_with_delta(
    activations: torch.dtype,
    weights: torch.dtype,
    activation: Activation,
    starts: tuple[int, ...],
    parts: int,
    rows: int,
    device: str,
) -> None:
    case = make(
        starts, weights, parts=parts, rows_per_chunk=rows, untouched=((0, 18), (0, 2)),
        under=parts == 1, h_dtype=activations if parts == 1 else F32,
    )  # fmt: skip
    x = random_rows(starts[-1], activations, case)
    there = expand_to(case.expand, device)
    out = cuda.gated(strided_to(x, device), activation, there).cpu()[case.touched]
    wide = reference.gated(x.double(), activation, in_float64(case.expand))[case.touched]
    # The sum is rounded before the activation, so the error goes with its terms.
    assert_close(out, wide, 2 * CHAIN, floor=40 * STEP[activations] + 2e-4)
    same_bits(out, reference.gated(x, activation, for_twins(case.expand))[case.touched], 3e-2)


BLOCK = 8
BLOCKS = 6


def make_caches(
    kv_heads: int, size: int, dtype: torch.dtype, device: str, other: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN: K [blocks, BLOCK, Hkv, D] with heads outside of slots, V [..., D or `other`] plain."""
    k = torch.full((BLOCKS, kv_heads, BLOCK, size), NAN, dtype=dtype, device=device)
    v = torch.full((BLOCKS, BLOCK, kv_heads, other or size), NAN, dtype=dtype, device=device)
    return k.transpose(1, 2), v


def make_slots(dtype: torch.dtype) -> torch.Tensor:
    slots = torch.randperm(BLOCKS * BLOCK)[:TOKENS].to(dtype)  # [T]
    slots[torch.tensor([5, 26, 29])] = -1
    return slots


def check_rope_kv(
    activations: torch.dtype,
    shape: tuple[int, int, int, int],
    device: str,
    case: Case | None = None,
    mode: NormMode | None = None,
    slot_dtype: torch.dtype = torch.int32,
) -> None:
    heads, kv_heads, size, rotated = shape
    qkv = random_rows((heads + 2 * kv_heads) * size, activations, case)
    angles = torch.rand(50, rotated // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), 1)  # [50, rot]
    positions, slots = torch.randint(50, (TOKENS,), dtype=torch.int32), make_slots(slot_dtype)
    norms = None
    if mode is not None:
        norms = (torch.randn(size).to(activations), torch.randn(size).to(activations))
    k_cache, v_cache = make_caches(kv_heads, size, activations, device)
    q = cuda.rope_kv(
        strided_to(qkv, device),
        table.to(device),
        positions.to(device),
        slots.to(device),
        k_cache,
        v_cache,
        heads,
        None if norms is None else (norms[0].to(device), norms[1].to(device)),
        1e-5,
        mode or "llama",
        None if case is None else expand_to(case.expand, device),
    ).cpu()
    kept = torch.ones(TOKENS, dtype=torch.bool) if case is None else case.touched
    slots = slots.where(kept, -1)
    for dtype in (torch.float64, activations):
        wide = dtype == torch.float64
        wanted_k, wanted_v = make_caches(kv_heads, size, dtype, "cpu")
        expand = None
        if case is not None:
            expand = in_float64(case.expand) if wide else for_twins(case.expand)
        wanted_q = reference.rope_kv(
            qkv.to(dtype).contiguous(),
            table,
            positions,
            slots,
            wanted_k,
            wanted_v,
            heads,
            None if norms is None else (norms[0].to(dtype), norms[1].to(dtype)),
            1e-5,
            mode or "llama",
            expand,
        )
        for ours, theirs in (
            (q[kept], wanted_q[kept]),
            (k_cache.cpu(), wanted_k),
            (v_cache.cpu(), wanted_v),
        ):
            assert torch.equal(ours.isnan(), theirs.isnan()), "exactly the kept slots are written"
            ours, theirs = ours.nan_to_num().contiguous(), theirs.nan_to_num()
            if wide:
                floor = 40 * STEP[activations] + 1e-4
                assert_close(ours, theirs, 2 * CHAIN, floor=floor)
            else:
                same_bits(ours, theirs, 3e-2)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_kv(dtype: torch.dtype, slot_dtype: torch.dtype, device: str) -> None:
    check_rope_kv(dtype, (3, 1, 64, 64), device, slot_dtype=slot_dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 1, 96, 96), (2, 2, 80, 20)])
def test_rope_kv_with_norms(shape: tuple[int, int, int, int], mode: NormMode, device: str) -> None:
    check_rope_kv(BF16, shape, device, mode=mode)


@pytest.mark.parametrize(
    "activations, weights, shape, slices, mode, parts, rows",
    [
        (BF16, BF16, (3, 1, 64, 64), 3, None, 1, 16),
        (BF16, F32, (3, 1, 96, 48), 3, "llama", 2, 16),
        (F16, F16, (2, 2, 80, 80), 1, "gemma", 1, 64),
        (F32, BF16, (6, 3, 16, 8), 3, "plain", 4, 64),
        (F32, F32, (3, 1, 64, 64), 2, None, 1, 16),
        (BF16, BF16, (3, 1, 64, 64), 3, None, 1, 4),
        (BF16, F32, (3, 1, 96, 48), 3, "llama", 2, 4),
        (F16, F16, (2, 2, 80, 80), 1, "gemma", 1, 3),
    ],
)
def test_rope_kv_with_delta(
    activations: torch.dtype,
    weights: torch.dtype,
    shape: tuple[int, int, int, int],
    slices: int,
    mode: NormMode | None,
    parts: int,
    rows: int,
    device: str,
) -> None:
    heads, kv_heads, size, _ = shape
    ends = [heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size]
    starts = (0, *ends[3 - slices :])
    case = make(
        starts, weights, parts=parts, rows_per_chunk=rows, untouched=((0, 36),),
        under=parts == 1, h_dtype=activations if parts == 1 else F32,
    )  # fmt: skip
    check_rope_kv(activations, shape, device, case, mode)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv(dtype: torch.dtype, slot_dtype: torch.dtype, device: str) -> None:
    merged = strided(TOKENS, 3 * (48 + 20), dtype=dtype)
    k, v = merged[:, : 3 * 48].view(TOKENS, 3, 48), merged[:, 3 * 48 :].view(TOKENS, 3, 20)
    slots = make_slots(slot_dtype)
    k_cache, v_cache = make_caches(3, 48, dtype, device, 20)
    wanted = make_caches(3, 48, dtype, "cpu", 20)
    cuda.write_kv(strided_to(k, device), strided_to(v, device), k_cache, v_cache, slots.to(device))
    kept = slots >= 0
    reference.write_kv(k[kept], v[kept], *wanted, slots[kept].long())
    for ours, theirs in zip((k_cache, v_cache), wanted, strict=True):
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        assert torch.equal(ours.cpu().nan_to_num(), theirs.nan_to_num())


def test_take_tokens(device: str) -> None:
    ids, chosen = torch.randint(1000, (300,), dtype=torch.int32), torch.randint(1000, (9,))
    sources = torch.randint(-3, 9, (300,), dtype=torch.int32)
    out = cuda.take_tokens(ids.to(device), sources.to(device), chosen.to(device)).cpu()
    assert out.dtype == torch.int64
    assert torch.equal(out, reference.take_tokens(ids, sources, chosen))
    none = cuda.take_tokens(*(int32([]).to(device) for _ in range(2)), chosen.to(device))
    assert none.shape == (0,)


def test_steps_without_rows_or_chunks(device: str) -> None:
    case = make_case((0, 32), RANKS, [], 4)
    expand = expand_to(case.expand, device)
    x = torch.randn(4, 32).bfloat16().to(device)
    assert cuda.gated(x, "silu", expand).shape == (4, 16)
    out, total = cuda.add_rms_norm(x, x, x[0], 1e-5, "llama", None, expand)
    assert out.shape == total.shape == (4, 32)
    empty = x[:0]
    assert cuda.gated(empty).shape == (0, 16)
    assert cuda.rms_norm(empty, x[0], 1e-5).shape == (0, 32)
    assert cuda.add_rms_norm(empty, empty, x[0], 1e-5)[0].shape == (0, 32)
