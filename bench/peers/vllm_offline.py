"""vLLM's offline API, in an environment of its own that has vLLM and nothing of loramux's.

PYTHONPATH=src path/to/that/python bench/peers/vllm_offline.py CASE.json
"""

from __future__ import annotations

import os
import sys

from loramux.bench.case import Case
from loramux.bench.ours import drive, llm_settings
from loramux.bench.worker import Generate, serve


def load(case: Case) -> Generate:
    # The engine in this process: its memory counts, and there is no second one to wait for.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    return drive(LLM(**llm_settings(case)), case, LoRARequest, SamplingParams)


if __name__ == "__main__":
    sys.exit(serve(load, sys.argv[1:]))
