"""What is measured: one case as a JSON file that every system reads, and the adapters it names.

Needs only the standard library, except `make_adapter`, which writes safetensors with numpy.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERT_KEYS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One workload: `concurrency` requests at once, request i with adapter i modulo their number.

    Prompts are random tokens, new ones in every run, so that no prefix cache can answer them.
    """

    model: str
    concurrency: int
    adapters: tuple[str, ...] = ()  # PEFT folders; none: the base model
    input_len: int = 128
    output_len: int = 64
    max_rank: int = 16
    dtype: str = "bfloat16"
    vocab_size: int = 49152
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Output tokens of one run."""
        return self.concurrency * self.output_len

    def prompts(self, run: int) -> list[list[int]]:
        dice = random.Random(f"{self.seed}/{self.concurrency}/{run}")
        return [
            [dice.randrange(3, self.vocab_size) for _ in range(self.input_len)]
            for _ in range(self.concurrency)
        ]

    def assignment(self, run: int) -> list[int | None]:
        """The adapter of each request as an index into `adapters`, round robin across runs."""
        if not self.adapters:
            return [None] * self.concurrency
        first = run * self.concurrency
        return [(first + i) % len(self.adapters) for i in range(self.concurrency)]

    def warm_up_runs(self) -> int:
        """How many runs it takes until each adapter has been used once."""
        return max(1, -(-len(self.adapters) // self.concurrency))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Case:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "adapters": tuple(values["adapters"])})


def model_config(model: str) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        ValueError: `model` is not a folder with a config.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model must be a local model folder, and {path} does not exist")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def is_mixture(config: dict[str, Any]) -> bool:
    """Whether a model has experts that a router chooses from."""
    return any(config.get(key) for key in EXPERT_KEYS)


def attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the four linears of a Llama-like layer's attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_out = heads * head_dim
    kv_out = (config.get("num_key_value_heads") or heads) * head_dim
    sizes = ((hidden, q_out), (hidden, kv_out), (hidden, kv_out), (q_out, hidden))
    return dict(zip(LINEARS[:4], sizes, strict=True))


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of a Llama-like layer.

    Raises:
        ValueError: a mixture of experts, of whose layers `linears.py` knows more.
    """
    if is_mixture(config):
        raise ValueError(
            f"this benchmark is for dense models, and {config.get('model_type')!r} is a mixture of "
            "experts, which decode, throughput --requests, load and profile measure"
        )
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
    return attention_shapes(config) | dict(zip(LINEARS[4:], sizes, strict=True))


def make_adapter(folder: Path, config: dict[str, Any], *, rank: int, seed: int) -> Path:
    """Write a PEFT LoRA folder on all seven linears with random weights; alpha is twice the rank.

    B is small but not zero, so that answers differ from the base model's and stay finite.

    Raises:
        ValueError: the model is a mixture of experts.
    """
    import numpy as np
    from safetensors.numpy import save_file

    dice = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in linear_shapes(config).items():
            block = "mlp" if name in LINEARS[4:] else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            a = dice.standard_normal((rank, inputs), dtype=np.float32) / np.float32(inputs**0.5)
            b = dice.standard_normal((outputs, rank), dtype=np.float32) * np.float32(0.01)
            tensors[f"{prefix}.lora_A.weight"] = a
            tensors[f"{prefix}.lora_B.weight"] = b
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LINEARS),
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
