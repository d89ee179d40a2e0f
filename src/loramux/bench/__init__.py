"""`loramux bench`: measurements that anyone can repeat.

    case.py       what is measured: a workload as a JSON file, and the adapters made for it
    worker.py     one system, one case, one process: runs on demand and reports its peak memory
    ours.py       the worker of loramux itself; other systems' are in the repository's bench/peers
    process.py    a worker as the driver sees it
    throughput.py the driver: all systems side by side, their runs interleaved
    report.py     rows, their medians, the table

Imports nothing heavy: workers of other systems import `loramux.bench.worker` in environments
that hold none of loramux's dependencies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: loramux bench WORKLOAD [options]

workloads:
  throughput   tokens/s, time to first token and peak memory, beside transformers and PEFT

loramux bench throughput --help lists its options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `loramux bench` with `argv` (without the words before it); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] != "throughput":
        print(f"loramux bench: there is no workload {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from loramux.bench.throughput import main as throughput

    return throughput(arguments[1:])
