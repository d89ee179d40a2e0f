"""The adapter reader against hostile files: an adapter that is served, or one refusal with reasons.

Each case is a good adapter with a few faults: in its configuration, in the header of its weights, in
their bytes, or in the folder. LORAMUX_FUZZ_CASES is how many are tried; `make fuzz` tries more.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterRejected
from loramux.models.loader import load_schema
from loramux.models.vocabulary import CheckpointVocabulary
from loramux.schema import ExpertsSpec, ModelSchema, ModuleSpec
from tiny import VOCAB, TinyWorld, save_adapter

CASES = int(os.environ.get("LORAMUX_FUZZ_CASES", "500"))
MOST_S = 15.0  # a case, with patterns that take their limit of 10 s
MOST_MESSAGE = 50_000  # characters of a refusal
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = LoRAConfig(max_lora_rank=8, enable_vocabulary_lora=True, max_lora_vocabulary_rows=9)
KNOWN_KEYS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "task_type"),
    *("layers_pattern", "init_lora_weights", "modules_to_save", "use_dora", "layer_replication"),
    *("fan_in_fan_out", "trainable_token_indices", "alora_invocation_tokens", "lora_bias"),
    "ensure_weight_tying",
]


@dataclass
class Case:
    """The files of an adapter before they are written."""

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes
    config_text: bytes | None = None
    header_text: bytes | None = None
    length: int | None = None
    """What the first eight bytes say, where it is not the truth."""
    cut: int | None = None
    """Bytes of the weights' file that are left."""
    extra: dict[str, bytes] = field(default_factory=dict)
    in_place: dict[str, str] = field(default_factory=dict)
    """Names of files that are something else: "missing", "folder", "loop", "pipe"."""

    def write(self, folder: Path) -> None:
        folder.mkdir()
        config = self.config_text
        if config is None:
            config = json.dumps(self.config).encode("utf-8", "surrogatepass")
        header = self.header_text
        if header is None:
            header = json.dumps(self.header).encode("utf-8", "surrogatepass")
        length = len(header) if self.length is None else self.length
        weights = length.to_bytes(8, "little") + header + self.data
        files = {CONFIG: config, WEIGHTS: weights[: self.cut], **self.extra}
        for name, content in files.items():
            path, kind = folder / name, self.in_place.get(name)
            if kind == "folder":
                path.mkdir()
            elif kind == "loop":
                path.symlink_to(name)
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind is None:
                path.write_bytes(content)


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> ModelSchema:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=LORA)).schema


@pytest.fixture(scope="module")
def good(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    return save_adapter(tiny_world.model, folder, r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def store(schema: ModelSchema, tiny_world: TinyWorld) -> Iterator[AdapterStore]:
    config = EngineConfig(model=str(tiny_world.model), lora=LORA)
    base = CheckpointVocabulary(config, schema, torch.float32)
    made = AdapterStore(
        *(schema, LORA, torch.float32),
        reserved_names=[],
        on_gone=lambda digest: None,
        base=base,
    )
    yield made
    made.close()


def case_of(folder: Path) -> Case:
    raw = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return Case(json.loads((folder / CONFIG).read_text()), json.loads(raw[8:end]), raw[end:])


def expert_schema() -> ModelSchema:
    """One layer with two experts, as `models` would describe it."""
    root = "model.layers.0.mlp"
    experts = ExpertsSpec(f"{root}.experts", 2, HIDDEN, INNER, False, False, True)
    sizes = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
    q = "model.layers.0.self_attn.q_proj"
    modules = {q: ModuleSpec(q, HIDDEN, HIDDEN, 0, 0)}
    for site, name in enumerate(experts.modules, start=1):
        modules[name] = ModuleSpec(name, *sizes[name.rpartition(".")[2]], site, 0, 2)
    return ModelSchema(modules, {}, {experts.name: experts}, hidden_size=HIDDEN)


@pytest.fixture(scope="module")
def expert_store() -> Iterator[AdapterStore]:
    lora = LoRAConfig(
        max_lora_rank=8, enable_mixed_moe_lora_format=True, enable_moe_shared_loras=True
    )
    made = AdapterStore(
        expert_schema(), lora, torch.float32, reserved_names=[], on_gone=lambda digest: None
    )
    yield made
    made.close()


HIDDEN, INNER, RANK = 8, 6, 2
# Name below the experts, and the shapes of A and B there.
EXPERT_LAYOUTS: dict[str, dict[str, tuple[list[int], list[int]]]] = {
    "per expert": {
        **{f".{e}.gate_proj": ([RANK, HIDDEN], [INNER, RANK]) for e in range(2)},
        **{f".{e}.up_proj": ([RANK, HIDDEN], [INNER, RANK]) for e in range(2)},
        **{f".{e}.down_proj": ([RANK, INNER], [HIDDEN, RANK]) for e in range(2)},
    },
    "fused": {
        ".base_layer": ([2 * RANK, HIDDEN], [2 * INNER, 2 * RANK]),
        "": ([2 * RANK, INNER], [HIDDEN, 2 * RANK]),
    },
    "shared": {
        ".w1": ([1, RANK, HIDDEN], [2, INNER, RANK]),
        ".w3": ([1, RANK, HIDDEN], [2, INNER, RANK]),
        ".w2": ([2, RANK, INNER], [1, HIDDEN, RANK]),
    },
}


def expert_case(layout: str) -> Case:
    """A good adapter for `expert_schema` in one of the layouts."""
    header: dict[str, Any] = {}
    end = 0
    for name, shapes in EXPERT_LAYOUTS[layout].items():
        for half, shape in zip("AB", shapes, strict=True):
            key = f"base_model.model.model.layers.0.mlp.experts{name}.lora_{half}.weight"
            start, end = end, end + 4 * math.prod(shape)
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3}
    if layout == "fused":
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    else:
        config["target_modules"] = r".*experts.*"
    data = np.random.default_rng().standard_normal(end // 4, dtype=np.float32).tobytes()
    return Case(config, header, data)


# --- values ------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e39, 3.5e38, 1e308, -1e308, 5e-324, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=6),
    st.sampled_from(
        [
            *("", ".", "q_proj", "(", "(a+)+$", ".*", "[", "\\", "a" * 3000, "\x00", "\ud800"),
            *("all-linear", "ALL-LINEAR", "\u202e", "(?P<n>x)(?P=n)", "(.*)*b", "LORA", "é" * 50),
            *(r"((q|q)+_*)*proj!", "SEQ_CLS", "score", "pissa", "lora_only", "^q_proj", "{}"),
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
NESTED = st.builds(
    lambda depth, opening: (opening * depth).encode(),
    st.sampled_from([10, 90, 150, 500, 900, 990, 2000, 100_000]),
    st.sampled_from(["[", '{"a":']),
)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# --- faults ------------------------------------------------------------------------------------

Fault = Callable[[Case], None]


@st.composite
def config_faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(["set", "set", "set", "own", "drop", "text", "nest", "twice"]))
    key = draw(st.sampled_from(KNOWN_KEYS))
    value = draw(VALUES)
    name, depth = draw(TEXTS), draw(st.sampled_from([50, 300, 900]))
    raw = draw(st.one_of(st.binary(max_size=40), NESTED))
    share = draw(st.floats(0, 1))

    def apply(case: Case) -> None:
        if kind == "set":
            case.config[key] = value
        elif kind == "own":
            case.config[name] = value
        elif kind == "drop":
            case.config.pop(key, None)
        elif kind == "nest":
            text = json.dumps(case.config)[:-1] + f', "{key}": ' + "[" * depth + "]" * depth + "}"
            case.config_text = text.encode("utf-8", "surrogatepass")
        else:
            text = json.dumps(case.config).encode("utf-8", "surrogatepass")
            cut = int(share * len(text))
            again = f', "{key}": {json.dumps(value)}}}'.encode("utf-8", "surrogatepass")
            case.config_text = text[:-1] + again if kind == "twice" else text[:cut] + raw

    return apply


@st.composite
def header_faults(draw: st.DrawFn) -> Fault:
    kinds = ["shape", "dtype", "offsets", "entry", "rename", "metadata", "drop", "copy", "text"]
    kind = draw(st.sampled_from([*kinds, "twice", "length", "empty", "widen"]))
    position = draw(st.integers(0, 1000))
    value, text = draw(VALUES), draw(TEXTS)
    numbers = draw(st.lists(st.one_of(st.integers(-5, 5000), NUMBERS), max_size=4))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "", "f32"]))
    raw = draw(st.one_of(st.binary(max_size=40), NESTED))
    length = draw(st.sampled_from([0, 1, 7, 100, 2**20, 2**31, 2**62, 2**63, 2**64 - 1]))

    def apply(case: Case) -> None:
        keys = sorted(key for key in case.header if isinstance(case.header[key], dict))
        key = keys[position % len(keys)] if keys else "__metadata__"
        entry = dict(case.header.get(key) or {})
        if kind in ("shape", "offsets", "dtype"):
            name = {"shape": "shape", "offsets": "data_offsets", "dtype": "dtype"}[kind]
            case.header[key] = entry | {name: dtype if kind == "dtype" else numbers}
        elif kind == "entry":
            case.header[key] = value
        elif kind == "rename":
            case.header[text] = case.header.pop(key, value)
        elif kind == "metadata":
            case.header["__metadata__"] = value
        elif kind == "drop":
            case.header.pop(key, None)
        elif kind == "copy":
            case.header[key + text] = entry
        elif kind == "length":
            case.length = length
        elif kind == "empty":
            case.header[key] = entry | {"shape": [0, 4], "data_offsets": [0, 0]}
        elif kind == "widen":
            shape = entry.get("shape")
            if isinstance(shape, list):
                case.header[key] = entry | {"shape": [1, *shape]}
        else:
            header = json.dumps(case.header).encode("utf-8", "surrogatepass")
            again = f', "{key}": {json.dumps(entry)}}}'.encode("utf-8", "surrogatepass")
            case.header_text = header[:-1] + again if kind == "twice" else header + raw

    return apply


@st.composite
def data_faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(["cut", "cut", "longer", "bits", "nan", "zeros"]))
    share, position = draw(st.floats(0, 1)), draw(st.integers(0, 1 << 20))
    noise = draw(st.binary(min_size=1, max_size=16))

    def apply(case: Case) -> None:
        if kind == "cut":
            case.cut = int(share * (len(case.data) + 500))
        elif kind == "longer":
            case.data += noise
        elif kind == "zeros":
            case.data = bytes(len(case.data))
        else:
            value = np.float32("nan").tobytes() if kind == "nan" else noise
            at = position % max(1, len(case.data) - len(value))
            case.data = case.data[:at] + value + case.data[at + len(value) :]

    return apply


@st.composite
def folder_faults(draw: st.DrawFn) -> Fault:
    name = draw(st.sampled_from([CONFIG, WEIGHTS]))
    kind = draw(st.sampled_from(["missing", "folder", "loop", "pipe"]))
    pickle = draw(st.booleans())

    def apply(case: Case) -> None:
        case.in_place[name] = kind
        if pickle:
            case.extra["adapter_model.bin"] = b"cos\nsystem\n(S'false'\ntR."

    return apply


@st.composite
def head_faults(draw: st.DrawFn) -> Fault:
    """A classification head, and labels from a file of the same folder."""
    shape = draw(st.one_of(st.just([3, 64]), st.lists(NUMBERS, max_size=3)))
    names = draw(st.one_of(st.just(["score"]), VALUES))
    labels = draw(st.one_of(VALUES, st.dictionaries(st.sampled_from(["0", "1", "2"]), VALUES)))
    key = draw(st.sampled_from(["score.weight", "score.bias", "classifier.weight"]))
    raw = draw(st.one_of(st.none(), st.binary(max_size=10), NESTED))

    def apply(case: Case) -> None:
        start = len(case.data)
        case.data += bytes(3 * 64 * 4)
        offsets = [start, len(case.data)]
        case.header[f"base_model.model.{key}"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": offsets,
        }
        case.config |= {"task_type": "SEQ_CLS", "modules_to_save": names}
        text = json.dumps({"id2label": labels}).encode("utf-8", "surrogatepass")
        case.extra["config.json"] = text if raw is None else raw

    return apply


VOCABULARY_ENDS = {
    "lora_embedding_A": [2, VOCAB],
    "lora_embedding_B": [64, 2],
    "lora_A.weight": [2, 64],
    "lora_B.weight": [VOCAB, 2],
    "token_adapter.trainable_tokens_delta": [3, 64],
    "weight": [VOCAB, 64],
    "base_layer.weight": [VOCAB, 64],
    "original_module.weight": [VOCAB + 2, 64],
    "modules_to_save.weight": [VOCAB, 64],
}


@st.composite
def vocabulary_faults(draw: st.DrawFn) -> Fault:
    """Parts of a vocabulary, alone or together, and a configuration that may name them."""
    modules = draw(
        st.sampled_from([["model.embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]])
    )
    ends = draw(st.lists(st.sampled_from(sorted(VOCABULARY_ENDS)), min_size=1, max_size=3))
    size = draw(st.sampled_from([0, 0, 0, 2, -5]))
    odd = draw(st.one_of(st.none(), st.none(), st.lists(NUMBERS, max_size=3)))
    ids = draw(
        st.one_of(
            st.just([3, 5, 7]),
            st.just({"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 4]}),
            st.lists(NUMBERS, max_size=4),
            st.dictionaries(TEXTS, st.lists(NUMBERS, max_size=3), max_size=3),
            VALUES,
        )
    )
    saved = draw(
        st.one_of(st.just(["embed_tokens", "lm_head"]), st.lists(TEXTS, max_size=3), VALUES)
    )
    keys = draw(st.lists(st.sampled_from(["tokens", "saved", "tied", "targets"]), max_size=4))

    def apply(case: Case) -> None:
        for module in modules:
            for end in ends:
                shape = [n + size if n >= VOCAB else n for n in VOCABULARY_ENDS[end]]
                start = len(case.data)
                case.data += bytes(4 * math.prod(shape))
                case.header[f"base_model.model.{module}.{end}"] = {
                    "dtype": "F32",
                    "shape": shape if odd is None else odd,
                    "data_offsets": [start, len(case.data)],
                }
        if "tokens" in keys:
            case.config["trainable_token_indices"] = ids
        if "saved" in keys:
            case.config["modules_to_save"] = saved
        if "tied" in keys:
            case.config["ensure_weight_tying"] = True
        if "targets" in keys:
            case.config["target_modules"] = ["q_proj", "down_proj", "embed_tokens", "lm_head"]

    return apply


FAULTS = st.lists(
    st.one_of(
        *(config_faults(), header_faults(), data_faults(), folder_faults(), head_faults()),
        vocabulary_faults(),
    ),
    max_size=3,
)


# --- the test ----------------------------------------------------------------------------------


many = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def run(case: Case, faults: list[Fault], folder: Path, store: AdapterStore) -> None:
    for fault in faults:
        fault(case)
    try:
        case.write(folder)
        check(folder, store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@many
@given(faults=FAULTS)
def test_a_file_is_an_adapter_or_a_refusal(
    faults: list[Fault], good: Path, store: AdapterStore
) -> None:
    run(case_of(good), faults, good.parent / uuid.uuid4().hex, store)


@settings(many, max_examples=max(1, CASES // 2))
@given(faults=FAULTS, layout=st.sampled_from(sorted(EXPERT_LAYOUTS)))
def test_so_is_one_with_experts(
    faults: list[Fault], layout: str, expert_store: AdapterStore, good: Path
) -> None:
    run(expert_case(layout), faults, good.parent / uuid.uuid4().hex, expert_store)


def check(folder: Path, store: AdapterStore) -> None:
    begun = time.monotonic()
    try:
        ref = store.add("fuzzed", str(folder))
    except AdapterRejected as error:
        event("refused")
        assert error.reasons and all(isinstance(r, str) and r for r in error.reasons)
        assert len(str(error).encode()) < MOST_MESSAGE, "a refusal can be sent to somebody"
        assert store.registry.current("fuzzed") is None and store.staged("fuzzed") is None
        assert len(store.host) == 0 and not store._sources and not store._heads
    else:
        event("accepted")
        check_accepted(folder, store, ref.digest)
        store.remove("fuzzed")
    finally:
        assert time.monotonic() - begun < MOST_S
    with store.registry.loading("fuzzed"):
        pass  # the name is free again


def check_accepted(folder: Path, store: AdapterStore, digest: str) -> None:
    """What was accepted is whole: every tensor of the file is served, with finite numbers."""
    ref, schema = store.registry.current("fuzzed"), store._schema
    assert ref is not None and ref.digest == digest and len(digest) == 64
    weights = store.fetch(ref).result()
    raw = (folder / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    if not schema.experts:
        heads = sum("score" in key or "classifier" in key for key in header)
        assert len(header) - heads == 2 * len(weights.pairs)
    bytes_served = sum(size for _, _, size in weights.layout.runs)
    assert bytes_served >= sum(b - a for a, b in (v["data_offsets"] for v in header.values()))
    parts = [(schema.modules[n], p.a, p.b.t(), p.scale) for n, p in weights.pairs.items()]
    for name, experts in weights.layout.experts.items():
        views = experts.views(weights.buffer)
        parts += [(schema.modules[name], a, b, scale) for _, a, b, scale in views]
    assert parts
    for spec, a, b, scale in parts:
        assert a.shape[1] == spec.in_features and b.shape == (spec.out_features, a.shape[0])
        assert bool(a.isfinite().all()) and bool(b.isfinite().all())
        assert math.isfinite(float(np.float32(scale)))
    assert all(isinstance(label, str) for label in ref.labels)
    json.dumps(ref.labels, ensure_ascii=False).encode()


@pytest.mark.parametrize("layout", sorted(EXPERT_LAYOUTS))
def test_the_good_experts_are_accepted(
    layout: str, expert_store: AdapterStore, tmp_path: Path
) -> None:
    expert_case(layout).write(tmp_path / "same")
    ref = expert_store.add(layout, str(tmp_path / "same"))
    assert expert_store.fetch(ref).result().layout.experts
    expert_store.remove(layout)


def test_the_good_adapter_is_accepted(good: Path, store: AdapterStore, tmp_path: Path) -> None:
    case_of(good).write(tmp_path / "same")
    ref = store.add("same", str(tmp_path / "same"))
    assert ref.max_r == 2 and len(store.fetch(ref).result().pairs) == 6
    store.remove("same")
