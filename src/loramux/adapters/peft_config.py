"""`adapter_config.json`, read with suspicion: what PEFT saved, what we serve, what we refuse.

Torch-free. Patterns come from strangers, so they are matched with a time limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex

from loramux.adapters.initialisations import reason_against
from loramux.adapters.invocation import (
    INVOCATION,
    MAX_TOKENS,
    invocation_of,
    is_badly_typed,
    reasons_against,
)
from loramux.adapters.peft_patterns import Matcher, PatternTable, at_the_end, is_plain
from loramux.adapters.token_indices import bad_token_indices, token_indices

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 8 << 20
MAX_PATTERN_CHARS = 2000
LARGEST_ALPHA = 3e38  # scales are float32
LARGEST_INT = 1 << 31
MAX_EXPRESSIONS = 2000  # compiling that many takes a second

# Keys that change what is computed and that we serve.
SUPPORTED = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "use_dora",
    "bias",
    "lora_bias",
    INVOCATION,
    # Which modules, tokens and ties there are, `adapters/vocabulary.py` holds against the model.
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
}

# Keys that change nothing at inference, whatever their value.
HARMLESS = {
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "lora_dropout",
    "auto_mapping",
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "qalora_group_size",
    "megatron_core",
    "fan_in_fan_out",  # how base weights lie, which PEFT looks up in the model
}

BIASES = ("none", "all", "lora_only")

# Names of the classification heads that PEFT saves beside LoRA for task_type SEQ_CLS.
HEAD_NAMES = ("score", "classifier")

# Keys that we refuse when set: why, in the user's words.
REFUSED = {
    "layer_replication": "layer replication makes another base model, with more layers, out of "
    "copies of these; one base model serves all adapters",
    "megatron_config": "Megatron layers are not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
}


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The part of the file that decides what is computed. Names are those that the file uses."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: PatternTable
    alpha_pattern: PatternTable
    target_modules: frozenset[str] | str
    target_parameters: frozenset[str]
    exclude_modules: frozenset[str] | str
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    matcher: Matcher
    saved_heads: tuple[str, ...] = ()  # names of classification heads in modules_to_save
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    invocation: tuple[int, ...] = ()  # tokens from which it applies; () is everywhere
    saved_modules: tuple[str, ...] = ()  # the other names there
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By a name of the module whose rows they are; by "" those of the input embedding."""
    ensures_tying: bool = False

    @property
    def targets_all_linear(self) -> bool:
        """Whether it is PEFT's shorthand for every linear layer but the output head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def r_of(self, module: str) -> int:
        """Rank of `module`: the first matching rank_pattern, else `r`."""
        return int(self.rank_pattern.value(module, self.r))

    def r_and_scale_of(self, module: str) -> tuple[int, float]:
        """`r_of`; and alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns applied to both.

        For LoRA on a parameter, `module` is the parameter's name.
        """
        r = self.r_of(module)
        alpha = float(self.alpha_pattern.value(module, self.alpha))
        return r, alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on `module`, by the rules of its own documentation."""
        if self._excludes(module):
            return False
        if isinstance(self.target_modules, str):
            return self.targets_all_linear or self.matcher.fullmatch(self.target_modules, module)
        if module in self.target_modules:
            return True
        if not _ends_in_one_of(module, self.target_modules):
            return False
        return self.layers_to_transform is None or self._in_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        """Whether PEFT would put LoRA on `parameter` through `target_parameters`."""
        return parameter in self.target_parameters or _ends_in_one_of(
            parameter, self.target_parameters
        )

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return self.matcher.fullmatch(self.exclude_modules, module)
        return module in self.exclude_modules or _ends_in_one_of(module, self.exclude_modules)

    def _in_layers(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := self.matcher.group(pattern, module):
                assert self.layers_to_transform is not None
                return int(found) in self.layers_to_transform
        return False


def _ends_in_one_of(name: str, ends: frozenset[str]) -> bool:
    """Whether `name` ends in a dot and one of `ends`."""
    at = name.find(".") if ends else -1
    while at >= 0:
        if name[at + 1 :] in ends:
            return True
        at = name.find(".", at + 1)
    return False


def read_config(folder: Path) -> tuple[PeftConfig | None, bytes, list[str]]:
    """Parse the folder's adapter_config.json.

    Returns (config, canonical bytes for the digest, reasons); config is None when it cannot be
    read at all. Every reason found is listed, not only the first.
    """
    path = folder / CONFIG_NAME
    try:
        if not path.is_file():
            return None, b"", [f"{CONFIG_NAME} is missing"]
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return None, b"", [f"{CONFIG_NAME} is larger than {MAX_CONFIG_BYTES} bytes"]
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, b"", [f"{CONFIG_NAME} cannot be read: {type(error).__name__}: {error}"]
    if not isinstance(data, dict):
        return None, b"", [f"{CONFIG_NAME} is not a JSON object"]
    reasons = _unserved(data) + _badly_typed(data)
    config = None if _badly_typed(data) else _build(data)
    canonical = {key: data[key] for key in sorted(data) if key in SUPPORTED}
    if not canonical.get(INVOCATION):
        canonical.pop(INVOCATION, None)  # PEFT writes null into every configuration
    return config, json.dumps(canonical, sort_keys=True).encode(), reasons


def _unserved(data: dict[str, Any]) -> list[str]:
    reasons = []
    if _word(data.get("peft_type", "LORA")) != "LORA":
        reasons.append(f"peft_type is {_said(data['peft_type'])}; only LORA is served")
    for key, value in data.items():
        off = value in (None, False, "", "none") or value == [] or value == {}
        if off or key in SUPPORTED or key in HARMLESS:
            continue
        reason = REFUSED.get(key, "this setting is unknown to loramux")
        reasons.append(f"{key[:80]}={_said(value)}: {reason}")
    if data.get("fan_in_fan_out") and data.get("target_parameters"):
        reasons.append("PEFT loads no adapter with both fan_in_fan_out and target_parameters")
    if data.get("use_dora") is True and data.get("lora_bias") is True:
        reasons.append("use_dora and lora_bias do not go together, in PEFT neither")
    if against := reason_against(data.get("init_lora_weights", True)):
        reasons.append(against)
    return reasons + reasons_against(data)


def _said(value: Any) -> str:
    """`value` as a message quotes it. A stranger's may be deeply nested, or have too many digits."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _saved(data: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of `modules_to_save`: those of classification heads, and the others."""
    names = data.get("modules_to_save") or ()
    classifies = _word(data.get("task_type")) == "SEQ_CLS"
    heads = tuple(name for name in names if classifies and name in HEAD_NAMES)
    return heads, tuple(name for name in names if name not in heads)


def _word(value: Any) -> str:
    """A name in capitals; empty for what is no text."""
    return value.upper() if isinstance(value, str) else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_INT


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -LARGEST_ALPHA <= value <= LARGEST_ALPHA  # not so for NaN


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(v, str) for v in value)
    )


def _badly_typed(data: dict[str, Any]) -> list[str]:
    reasons = []
    for key in ("r", "lora_alpha", "target_modules"):
        implied = key == "target_modules" and data.get("target_parameters")
        if data.get(key) is None and not implied:
            reasons.append(f"{key} is missing from {CONFIG_NAME}")
    if data.get("r") is not None and not (_is_int(data["r"]) and data["r"] >= 1):
        reasons.append(f"r must be a whole number of at least 1, not {_said(data['r'])}")
    if data.get("lora_alpha") is not None and not _is_number(data["lora_alpha"]):
        reasons.append(f"lora_alpha must be a finite number, not {_said(data['lora_alpha'])}")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = data.get(key)
        if value is not None and not _is_names(value):
            reasons.append(f"{key} must be a string or a list of strings")
    parameters = data.get("target_parameters")
    if parameters is not None and (isinstance(parameters, str) or not _is_names(parameters)):
        reasons.append("target_parameters must be a list of strings")
    reasons += _badly_typed_more(data)
    layers = data.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(_is_int(n) for n in numbers):
        reasons.append("layers_to_transform must be a whole number or a list of them")
    for key, valid in (
        ("rank_pattern", lambda v: _is_int(v) and v >= 1),
        ("alpha_pattern", _is_number),
    ):
        value = data.get(key) or {}
        if not (isinstance(value, dict) and all(valid(v) for v in value.values())):
            reasons.append(f"{key} must map patterns to positive numbers")
    return reasons + _bad_patterns(data)


def _badly_typed_more(data: dict[str, Any]) -> list[str]:
    """Of what an adapter may have beside factors."""
    reasons = []
    for key in ("use_dora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(data.get(key) or False, bool):
            reasons.append(f"{key} must be true or false, not {_said(data[key])}")
    if data.get("bias") not in (*BIASES, None, False, ""):
        reasons.append(f"bias must be one of {', '.join(BIASES)}, not {_said(data['bias'])}")
    if is_badly_typed(data):
        reasons.append(f"{INVOCATION} must be a list of up to {MAX_TOKENS} token ids")
    saved = data.get("modules_to_save")
    if saved and not (isinstance(saved, list) and _is_names(saved)):
        reasons.append(f"modules_to_save={_said(saved)} must be a list of strings")
    return reasons + bad_token_indices(data.get("trainable_token_indices"))


def _bad_patterns(data: dict[str, Any]) -> list[str]:
    """Reasons for patterns that are too long or do not compile."""
    patterns: list[tuple[str, str]] = []  # what is said of it, what is compiled
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(data.get(key), dict):
            patterns += [(p, at_the_end(p)) for p in data[key] if not is_plain(p)]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(data.get(key), str):
            patterns.append((data[key], data[key]))
    layers = data.get("layers_pattern")
    patterns += [(p, p) for p in _listed(layers if _is_names(layers) else None)]
    if len(patterns) > MAX_EXPRESSIONS:
        return [f"it has {len(patterns)} regular expressions, more than {MAX_EXPRESSIONS}"]
    reasons = []
    for pattern, expression in patterns:
        if len(pattern) > MAX_PATTERN_CHARS:
            reasons.append(f"the pattern {pattern[:40]!r}... is too long")
            continue
        try:
            regex.compile(pattern)
            regex.compile(expression)
        except regex.error as error:
            reasons.append(f"the pattern {pattern!r} is no regular expression: {error}")
    return reasons


def _build(data: dict[str, Any]) -> PeftConfig:
    layers = data.get("layers_to_transform")
    if _is_int(layers):
        layers = [layers]
    matcher = Matcher()
    heads, modules = _saved(data)
    return PeftConfig(
        r=data["r"],
        alpha=float(data["lora_alpha"]),
        use_rslora=bool(data.get("use_rslora")),
        rank_pattern=PatternTable(data.get("rank_pattern") or {}, matcher),
        alpha_pattern=PatternTable(data.get("alpha_pattern") or {}, matcher),
        target_modules=_names(data.get("target_modules") or []),
        target_parameters=frozenset(data.get("target_parameters") or []),
        exclude_modules=_names(data.get("exclude_modules") or []),
        layers_to_transform=tuple(layers) if layers else None,
        layers_pattern=_listed(data.get("layers_pattern")),
        matcher=matcher,
        saved_heads=heads,
        use_dora=bool(data.get("use_dora")),
        lora_bias=bool(data.get("lora_bias")),
        bias=data.get("bias") or "none",
        invocation=invocation_of(data),
        saved_modules=modules,
        token_indices=token_indices(data.get("trainable_token_indices")),
        ensures_tying=bool(data.get("ensure_weight_tying")),
    )


def _names(value: Any) -> frozenset[str] | str:
    return value if isinstance(value, str) else frozenset(value)


def _listed(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
