"""Compile the C++ ops once per machine, keep the library in a cache folder, load it by ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = ("cpu_kernels.cpp", "cpu_attention.h", "cpu_glue.h", "cpu_lora.h", "cpu_simd.h")
ABI = 2
# GCC versions differ in their default for -ffp-contract; the twins' tolerance allows it.
FLAGS = (
    *("-O3", "-std=gnu++17", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"),
    *("-fvisibility-inlines-hidden", "-fno-semantic-interposition"),
)
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Libraries:
    """One shared object, twice: calls that keep Python's lock and calls that release it."""

    holding: ctypes.PyDLL
    releasing: ctypes.CDLL


@cache
def library() -> Libraries | None:
    """The compiled ops, or None: switched off, no compiler, or the build failed (logged once)."""
    if os.environ.get("LORAMUX_CPU_KERNELS") == "reference":
        return None
    try:
        path = str(_built())
        libraries = Libraries(ctypes.PyDLL(path), ctypes.CDLL(path))
        if libraries.holding.loramux_abi() != ABI:
            raise OSError(f"{path} is not of ABI {ABI}")
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        logger.warning("CPU kernels fall back to slower torch code: %s", detail[-800:].strip())
        return None
    return libraries


def torch_openmp() -> Path | None:
    """The OpenMP runtime that torch has mapped; a second one would fight it for the cores."""
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*)$", maps, flags=re.MULTILINE)
    return Path(paths[0]) if paths else None


def cache_folder() -> Path:
    """Where libraries are kept: $LORAMUX_CACHE, $XDG_CACHE_HOME/loramux or ~/.cache/loramux."""
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loramux" / "kernels"


def _built() -> Path:
    """Path of the library for this source, compiler and processor; builds it if it is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler (g++) was found")
    openmp = torch_openmp()
    compile_flags = [*FLAGS, _tuning(), *(["-fopenmp"] if openmp else [])]
    target = cache_folder() / f"{_key(compiler, compile_flags, openmp)}.so"
    if not target.exists():
        _compile(compiler, compile_flags, openmp, target)
    return target


def _tuning() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _key(compiler: str, flags: list[str], openmp: Path | None) -> str:
    """Hash of everything that decides what the library contains."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    version = _run([compiler, "--version"])
    digest.update("\0".join([version, *flags, str(openmp and openmp.name), _cpu_flags()]).encode())
    return digest.hexdigest()[:24]


def _cpu_flags() -> str:
    """What -march=native depends on, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "cpu family", "model\t", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, flags: list[str], openmp: Path | None, target: Path) -> None:
    """Build into a temporary folder beside `target`, then rename: racing builders both win."""
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling the CPU kernels into %s", target)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source = Path(__file__).parent / SOURCES[0]
        loaded, made = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        _run([compiler, *flags, "-c", str(source), "-o", str(loaded)])
        # Linking without -fopenmp but with torch's own file makes the loader find that very one.
        runtime = [str(openmp)] if openmp else []
        _run([compiler, "-shared", str(loaded), "-Wl,--no-as-needed", *runtime, "-o", str(made)])
        made.replace(target)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout
