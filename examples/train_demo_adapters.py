"""Train the six demo adapters: real PEFT LoRA adapters for SmolLM2-135M-Instruct.

The adapters differ in rank, scaling and target modules, so that serving them side by side
exercises every kind of LoRA layer. The data comes from `demo_data`. On two CPU cores an adapter
takes a few minutes.

    python examples/train_demo_adapters.py                     # all, into examples/adapters/
    python examples/train_demo_adapters.py --only sql --steps 50
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_data import BEHAVIOURS, Example
from demo_model import MODEL_NAME, ensure_demo_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ADAPTER_FOLDER = Path(__file__).resolve().parent / "adapters"
BATCH_SIZE = 8
WARM_UP_STEPS = 10
IGNORED = -100  # label of the positions that do not count in the loss


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained: the LoRA settings, the steps and the peak learning rate."""

    steps: int
    lora: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-3


RECIPES: dict[str, Recipe] = {
    "json-contact": Recipe(
        steps=150,
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "sentiment": Recipe(
        steps=80,
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "capitals": Recipe(
        steps=120,
        lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    ),
    "pirate": Recipe(
        steps=100,
        lora={
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
        },
    ),
    "iso-date": Recipe(
        steps=200,
        lora={
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["o_proj", "down_proj"],
        },
    ),
    # Rank and alpha by pattern: values at half the rank, the queries of the first four layers
    # at a quarter of it with a smaller alpha.
    "sql": Recipe(
        steps=200,
        lora={
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 8, r"layers\.[0-3]\.self_attn\.q_proj": 4},
            "alpha_pattern": {r"layers\.[0-3]\.self_attn\.q_proj": 6},
        },
    ),
}


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Return the token ids of the whole chat and its labels, where only the answer counts."""
    messages = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # The end-of-sequence token belongs to the answer: without it the adapter would never stop.
    answer = tokenizer(example.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return question + answer, [IGNORED] * len(question) + answer


def batches(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield right-padded batches: `input_ids`, `attention_mask` and `labels`, all [batch, time]."""
    for start in range(0, len(examples), BATCH_SIZE):
        encoded = [encode(tokenizer, example) for example in examples[start : start + BATCH_SIZE]]
        length = max(len(ids) for ids, _ in encoded)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids, labels in encoded:
            gap = length - len(ids)
            rows["input_ids"].append(ids + [tokenizer.pad_token_id] * gap)
            rows["attention_mask"].append([1] * len(ids) + [0] * gap)
            rows["labels"].append(labels + [IGNORED] * gap)
        yield {name: torch.tensor(value) for name, value in rows.items()}


def answer_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross-entropy (nats, scalar) over the answer tokens of the batch.

    Only the hidden states that predict an answer token go through the 49152-wide output layer,
    which would otherwise be a fifth of the work.
    """
    causal = model.get_base_model()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = causal.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    logits = causal.lm_head(hidden[counted])
    return torch.nn.functional.cross_entropy(logits.float(), targets[counted])


def train(base: Path, name: str, steps: int) -> tuple[PeftModel, float]:
    """Train adapter `name` for `steps` steps on the model in folder `base`.

    Returns the model with the adapter, and the mean loss of the last ten steps in nats per token.
    """
    recipe = RECIPES[name]
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # PEFT keeps the LoRA weights of a bfloat16 model in float32, which training needs.
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", bias="none", **recipe.lora))
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP_STEPS, (steps - step) / steps),
    )
    losses: list[float] = []
    data = batches(tokenizer, BEHAVIOURS[name].training(steps * BATCH_SIZE))
    console = Console(stderr=True)
    for batch in track(data, description=f"{name:14}", total=steps, console=console):
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-10:]
    return model, sum(tail) / len(tail)


def save(model: PeftModel, folder: Path) -> int:
    """Write the adapter in bfloat16 to `folder` and return its size in bytes.

    The configuration names the base model as published, never the local copy, and is the same
    in every run: PEFT keeps the target modules in a set, so they are put in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = MODEL_NAME
    config.inference_mode = True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # Asking for no embeddings keeps PEFT from looking the base model up on the hub.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    return weights.stat().st_size


def main() -> None:
    """Train the adapters named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Train the demo LoRA adapters.")
    parser.add_argument("--only", action="append", choices=sorted(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, help="training steps instead of the recipe's own")
    parser.add_argument("--output", type=Path, default=ADAPTER_FOLDER, metavar="FOLDER")
    arguments = parser.parse_args()
    base = ensure_demo_model()
    console = Console(stderr=True)
    for name in arguments.only or RECIPES:
        start = time.monotonic()
        model, loss = train(base, name, arguments.steps or RECIPES[name].steps)
        size = save(model, arguments.output / name)
        seconds = time.monotonic() - start
        console.print(f"{name}: {seconds:.0f} s, final loss {loss:.4f}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
