"""PEFT's mixed batches: one `generate` call in which each row names its adapter.

PYTHONPATH=src python bench/peers/peft_mixed.py CASE.json
"""

from __future__ import annotations

import sys

from transformers_generate import generate_with, load_model

from loramux.bench.case import Case
from loramux.bench.worker import Answer, Generate, serve

BASE = "__base__"  # PEFT's name for a row without an adapter


def load(case: Case) -> Generate:
    from peft import PeftModel

    names = [f"adapter-{i}" for i in range(len(case.adapters))]
    if not names:
        raise ValueError("this peer measures adapters; transformers_generate.py takes the base")
    # Adapters in the model's type, as ours are; PEFT would keep them in float32.
    model = PeftModel.from_pretrained(
        load_model(case), case.adapters[0], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name, path in zip(names[1:], case.adapters[1:], strict=True):
        model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    model.to(model.dtype).eval()

    def generate(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        rows = [BASE if i is None else names[i] for i in adapters]
        return generate_with(model, prompts, output_len, adapter_names=rows)

    return generate


if __name__ == "__main__":
    sys.exit(serve(load, sys.argv[1:]))
