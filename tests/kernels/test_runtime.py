"""What surrounds the ops: twins for all, the build and its cache, one OpenMP, the packed linear."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_close

import loramux.kernels
from loramux.kernels import OPS, PackedLinear, cpu_build, reference

compiled = pytest.mark.skipif(cpu_build.library() is None, reason="no compiled CPU kernels here")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_twin_of_the_same_form(name: str) -> None:
    front, twin = getattr(loramux.kernels, name), getattr(reference, name)
    assert inspect.signature(front) == inspect.signature(twin)
    assert name in loramux.kernels.__all__ and front.__doc__ and twin.__doc__


@compiled
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_compiled_for_the_cpu(name: str) -> None:
    from loramux.kernels import cpu

    assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(reference, name))


@compiled
def test_only_torchs_openmp_is_mapped() -> None:
    script = (
        "import torch, re; from loramux.kernels.dispatch import backend\n"
        "assert backend(torch.device('cpu')).__name__.endswith('.cpu')\n"
        "maps = open('/proc/self/maps').read()\n"
        r"print(len(set(re.findall(r'(/\S*/lib(?:gomp|iomp5|omp)\S*)', maps))))"
    )
    assert run(script).stdout.split() == ["1"]


def test_the_twins_can_be_forced() -> None:
    script = (
        "import torch; from loramux.kernels.dispatch import backend\n"
        "print(backend(torch.device('cpu')).__name__)"
    )
    done = run(script, LORAMUX_CPU_KERNELS="reference")
    assert done.stdout.split() == ["loramux.kernels.reference"]


def test_without_a_compiler_there_is_one_warning_and_the_twins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.delenv("LORAMUX_CPU_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        assert cpu_build.library.__wrapped__() is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"LORAMUX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/loramux/kernels"),
        ({"HOME": "/c"}, "/c/.cache/loramux/kernels"),
    ],
)
def test_cache_folder(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORAMUX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cpu_build.cache_folder() == Path(folder)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.booleans())
def test_packed_linear_of_any_size(n: int, k: int, tokens: int, with_bias: bool) -> None:
    for dtype in DTYPES:
        weight, x = torch.randn(n, k).to(dtype), torch.randn(tokens, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        linear = PackedLinear(weight, bias)
        wanted = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
        assert_close(linear(x), wanted, steps=2.0, floor=2e-5 * k)
        assert torch.equal(linear.dense(), weight)
        assert linear.weight_nbytes == weight.nbytes


def test_packed_linear_takes_strided_and_empty_input() -> None:
    weight, wide = torch.randn(96, 64).bfloat16(), torch.randn(5, 100).bfloat16()
    linear = PackedLinear(weight)
    wanted = wide[:, 20:84].double() @ weight.double().T
    assert_close(linear(wide[:, 20:84]), wanted, steps=2.0, floor=1e-2)
    assert linear(wide[:0, :64]).shape == (0, 96)
    assert linear(torch.ones(2, 3, 64).bfloat16()).shape == (2, 3, 96)


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
