"""`loramux bench`: measurements that anyone can repeat.

    decode.py, at_once.py, load.py    on an engine, stepped one by one: how it is measured, what is shown
    prefill.py                        the part of decode.py that reads long prompts
    profile.py                        the same engine under a profiler
    media.py                          requests with images, in this process
    alora.py                          a conversation evaluated by adapters, in this process
    kernels.py, kernel_set.py         on the ops alone
    sitting.py                        options, folders and results of one run of a command
    jobs.py                           one engine in one process, and the driver's view of it
    system.py                         an engine as these drive it; other systems' are in bench/peers
    geometry.py                       checkpoints without weights, adapters by the hundred
    ceilings.py                       what the device can do, and the floor of a step

    throughput.py                     small models beside transformers and PEFT, runs interleaved
    case.py, worker.py, ours.py       its workload as a JSON file, and the process of one system
    process.py, report.py             that process as the driver sees it; rows, headers, the table

Imports nothing heavy: workers of other systems import `loramux.bench.worker` in environments
that hold none of loramux's dependencies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

USAGE = """usage: loramux bench WORKLOAD [options]

workloads:
  decode       milliseconds of a decode step, by batch size and adapters in the batch
  throughput   tokens/s of many requests at once (--requests N), or of a small model beside
               transformers and PEFT, with time to first token and peak memory
  load         what the first use of an adapter costs its request, and all other streams
  alora        time to first token of activated LoRA that evaluates a conversation, beside plain
  media        requests with an image each, over adapters on language model and tower
  kernels      microseconds of the products and LoRA kernels at a model's sizes
  profile      where the microseconds of a step go, kernel by kernel

loramux bench WORKLOAD --help lists its options."""

WORKLOADS = ("decode", "throughput", "load", "alora", "media", "kernels", "profile")


def main(argv: Sequence[str] | None = None, commands: Mapping[str, list[str]] | None = None) -> int:
    """Run `loramux bench` with `argv` (without the words before it); returns the exit status.

    `commands` names the systems to measure, each with the command of its worker; a peer's script
    gives itself.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    workload, rest = arguments[0], arguments[1:]
    if workload not in WORKLOADS:
        print(f"loramux bench: there is no workload {workload!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from importlib import import_module

    run = import_module(f"loramux.bench.{workload}").main
    return int(run(rest, None if commands is None else dict(commands)))
