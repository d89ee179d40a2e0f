"""One system, one case, one process: the loop around a `Generate` function.

A worker is started with the path of a case file. It loads, warms up, says so, and then does one
run for every line on stdin, a number, answering each with a line of JSON; at the end of stdin it
answers with its peak memory. By hand:

    seq 3 | python bench/peers/peft_mixed.py case.json

Needs only the standard library.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from loramux.bench.case import Case

WARM_UP_TOKENS = 4


@dataclass(slots=True)
class Answer:
    """What a system says of one run: tokens that came out, and each request's time to its first.

    A system that cannot tell the latter from inside a run leaves `ttft_s` empty; the worker
    then times a run of one token.
    """

    num_tokens: int
    ttft_s: list[float] = field(default_factory=list)


class Generate(Protocol):
    """Continue each prompt greedily by exactly `output_len` tokens, whatever EOS says."""

    def __call__(
        self, prompts: list[list[int]], adapters: list[int | None], output_len: int
    ) -> Answer: ...


def serve(load: Callable[[Case], Generate], argv: Sequence[str]) -> int:
    """Be the worker of the case in `argv[0]`."""
    if len(argv) != 1:
        print("usage: <worker> CASE.json   (then one line with a number for each run)")
        return 2
    replies = take_stdout()
    case = Case.read(Path(argv[0]))
    started = time.perf_counter()
    generate = load(case)
    loaded = time.perf_counter()
    warm_up(generate, case)
    _reply(
        replies,
        {"load_s": loaded - started, "warm_up_s": time.perf_counter() - loaded},
    )
    for line in sys.stdin:
        _reply(replies, one_run(generate, case, int(line)))
    _reply(replies, {"peak_rss_mib": peak_rss_mib()})
    return 0


def warm_up(generate: Generate, case: Case) -> None:
    """Short runs until every adapter has been used."""
    short = replace(case, seed=case.seed + 1)
    for run in range(case.warm_up_runs()):
        generate(short.prompts(run), short.assignment(run), min(WARM_UP_TOKENS, case.output_len))


def one_run(generate: Generate, case: Case, run: int) -> dict[str, Any]:
    prompts, adapters = case.prompts(run), case.assignment(run)
    started = time.perf_counter()
    answer = generate(prompts, adapters, case.output_len)
    seconds = time.perf_counter() - started
    if answer.num_tokens != case.num_tokens:
        raise RuntimeError(f"{answer.num_tokens} tokens came out instead of {case.num_tokens}")
    ttft = answer.ttft_s or [_first_token_s(generate, case, run)]
    return {"seconds": seconds, "tok_s": answer.num_tokens / seconds, "ttft_s": ttft}


def _first_token_s(generate: Generate, case: Case, run: int) -> float:
    """Seconds until all requests have one token, with prompts that the timed run did not have."""
    other = replace(case, seed=case.seed + 2)
    prompts, adapters = other.prompts(run), other.assignment(run)
    started = time.perf_counter()
    generate(prompts, adapters, 1)
    return time.perf_counter() - started


def peak_rss_mib() -> float:
    """Peak resident memory of this process in MiB.

    Linux keeps it for the program itself; `getrusage`, elsewhere, may count the parent's at fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def take_stdout() -> TextIO:
    """Keep stdout for replies: what libraries print goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()
