"""Multimodal models behind our attention: encoders, positions, the language model and adapters on every
part give what transformers and PEFT give."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from loramux.adapters.peft import read_adapter
from loramux.config import EngineConfig, LoRAConfig
from loramux.config.engine import resolve
from loramux.engine.cpu_runner import CpuRunner
from loramux.engine.plan import AdapterLoad
from loramux.errors import EngineError
from loramux.layers.batch import Overlay, UniformLoRA
from loramux.media import Audio, Image
from loramux.models import proof
from loramux.models.attach import Attached
from loramux.models.item_cache import ItemCache
from loramux.models.loader import LoadedModel, load_model
from loramux.models.processor import MediaProcessor
from loramux.models.proof import small_cache, small_step
from loramux.models.stock_processor import StockProcessor
from loramux.models.text import TextProcessor
from loramux.models.towers import Towers
from loramux.types import MediaItem
from parity.media_items import Prompt, features, make_prompt
from parity.multimodal import (
    FAMILIES,
    SAMPLING_RATE,
    MediaOracle,
    random_audio,
    random_image,
    save_adapter,
    save_model,
)
from parity.multimodal_families import SIDE

SERVED = [name for name in FAMILIES if name != "paligemma"]
LONGEST = 256  # tokens
CLOSE = {"atol": 2e-3, "rtol": 1e-3}


@dataclass(frozen=True)
class Case:
    """A family's model as transformers and as we run it, with an adapter on each part of it."""

    name: str
    oracle: MediaOracle
    loaded: LoadedModel
    places: dict[str, int]
    """First pool row by adapter, of those that are linear layers throughout."""

    ranks: dict[str, int]

    @property
    def attached(self) -> Attached:
        return self.loaded.attached

    @property
    def towers(self) -> Towers:
        assert self.attached.towers is not None
        return self.attached.towers

    def prompt(self, seed: int = 1) -> Prompt:
        """Several items of each modality, of different sizes."""
        media: dict[Any, list[Any]] = {}
        if "image" in self.oracle.family.prompts:
            media["image"] = [random_image(seed), random_image(seed + 1, 40, 60)]
            media["image"].append(random_image(seed + 2))
        if "audio" in self.oracle.family.prompts:
            # Padded for a longer one in the same prompt, sounds of these two are heard differently.
            lengths = (
                (0.6, 0.6) if self.name in ("granite-speech", "phi4-multimodal") else (0.6, 0.8)
            )
            media["audio"] = [random_audio(seed + i, length) for i, length in enumerate(lengths)]
        return make_prompt(self.oracle, media)

    def uniform(self, composition: dict[str, float]) -> UniformLoRA:
        members = tuple((self.places[name], scale) for name, scale in composition.items())
        return UniformLoRA(members, tuple(self.ranks[name] for name in composition))

    def overlay(self, prompt: Prompt, start: int, end: int) -> Overlay:
        """What of the items stands at tokens `start` to `end`, in no order."""
        rows = prompt.rows()  # [M]
        vectors = torch.cat(self.towers.encode(prompt.items, None), dim=1)  # [1 + L, M, D]
        there = ((rows >= start) & (rows < end)).nonzero().flatten().flip(0)  # [M']
        return Overlay(rows[there] - start, vectors[:, there])


@pytest.fixture(scope="module", params=SERVED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    root = tmp_path_factory.mktemp(name)
    folder = save_model(root / "model", name)
    parts = FAMILIES[name].parts
    adapters = {
        part: save_adapter(folder, root / part, part, seed=seed, r=3 + seed)
        for seed, part in enumerate(parts)
    }
    lora = LoRAConfig(enable_tower_connector_lora=True, max_loras=len(parts), max_lora_rank=8)
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", lora=lora, max_model_len=LONGEST
    )
    loaded = load_model(config)
    runner = CpuRunner(loaded.attached, resolve(config, loaded.facts), loaded.facts)
    places, ranks = {}, {}
    for index, (part, path) in enumerate(adapters.items()):
        if not isinstance(parts[part], str):
            continue  # Gemma 3's connector is a bare matrix
        weights, _ = read_adapter(part, path, loaded.attached.schema, lora, torch.float32)
        places[part], ranks[part] = 8 * index, weights.ref.max_r
        runner.load(AdapterLoad(weights.ref, places[part]), weights)
    return Case(name, MediaOracle(folder, adapters), loaded, places, ranks)


def together(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(vectors, dim=1)  # [1 + L, M, D]


def test_items_get_the_vectors_of_the_whole_model(case: Case) -> None:
    prompt = case.prompt()
    got = case.towers.encode(prompt.items, None)
    assert [vectors.shape[1] for vectors in got] == [item.num_vectors for item in prompt.items]
    torch.testing.assert_close(together(got), features(case.oracle, prompt), **CLOSE)
    size = got[0][:, 0].numel() * got[0].element_size()
    assert case.towers.vector_bytes == size
    assert case.towers.modalities >= set(case.oracle.family.prompts)


def test_items_get_the_same_alone(case: Case) -> None:
    items = case.prompt(seed=5).items
    for item, vectors in zip(items, case.towers.encode(items[::-1], None)[::-1], strict=True):
        (alone,) = case.towers.encode([item], None)
        torch.testing.assert_close(vectors, alone, atol=1e-4, rtol=1e-4)
        assert vectors.untyped_storage().nbytes() == vectors.numel() * vectors.element_size()


def test_a_sum_of_adapters_on_towers_and_connectors_is_pefts(case: Case) -> None:
    prompt = case.prompt()
    base = together(case.towers.encode(prompt.items, None))
    scales = (0.7, 1.0, -0.4, 0.3)
    parts = [part for part in case.places if part != "language"]
    wanted = dict(zip(parts, scales, strict=False))
    got = together(case.towers.encode(prompt.items, case.uniform(wanted)))
    torch.testing.assert_close(got, features(case.oracle, prompt, wanted), atol=5e-3, rtol=2e-3)
    assert (got - base).abs().max() > 0.05
    assert torch.equal(together(case.towers.encode(prompt.items, None)), base)


def test_positions_are_the_models_own(case: Case) -> None:
    prompt = case.prompt()
    model: Any = case.oracle.base
    owner = model if hasattr(model, "get_rope_index") else model.model
    ids = prompt.ids.tolist()
    positions, shift = case.towers.rope_index(ids, prompt.items)
    if not hasattr(owner, "get_rope_index"):
        assert (positions, shift) == (None, 0)
        return
    owner.rope_deltas = None
    case.oracle.logits(prompt.inputs)  # leaves what it has found
    assert shift == int(owner.rope_deltas)
    assert positions is not None and positions.shape == (3, len(ids))
    assert positions.dtype == "int32" and positions.max() + 1 == len(ids) + shift
    ours: Any = case.attached.model
    assert getattr(ours, "rope_deltas", None) is getattr(ours.model, "rope_deltas", None) is None
    assert case.towers.rope_index(ids, []) == (None, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_over_a_cache_give_the_whole_models_logits(
    case: Case, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "BLOCK", LONGEST)
    attached, prompt = case.attached, case.prompt()
    count = len(prompt.ids)
    spans = [span for item in prompt.items for span in item.spans]
    both_ways = case.name == "gemma3"
    # Within the first item, unless that is seen both ways.
    cut = spans[0][1] if both_ways else int(prompt.rows(prompt.items[:1])[1])
    seen = torch.full((count,), -1, dtype=torch.int32)  # [T]
    for start, end in spans if both_ways else ():
        seen[start:end] = end - 1
    found, _ = case.towers.rope_index(prompt.ids.tolist(), prompt.items)
    positions = torch.arange(count) if found is None else torch.from_numpy(found)  # [T] or [3, T]
    wanted = case.oracle.logits(prompt.inputs)  # [T, V]
    with torch.inference_mode(), small_cache(attached):
        for start, end in ((0, cut), (cut, count)):
            ids, places = prompt.ids[start:end], positions[..., start:end]
            keep = torch.arange(end - start - 1, -1, -2).flip(0)  # [B]
            overlay = case.overlay(prompt, start, end)
            with small_step(attached, start, end):
                batch, decoder = attached.batch, attached.decoder
                assert batch.attention is not None and decoder is not None
                batch.attention = replace(batch.attention, last_keys=seen[start:end])
                if not fused:
                    logits = attached.own_forward(ids, places, keep, overlay)  # [B, V]
                else:
                    if places.dim() == 2:
                        places = decoder.set_positions(places.long()) + torch.arange(end - start)
                    batch.positions = places.int()  # [T']
                    logits = decoder.forward(ids, keep, overlay=overlay)  # [B, V]
            torch.testing.assert_close(logits, wanted[start:end][keep], atol=2e-2, rtol=2e-3)


def test_text_alone_gives_the_whole_models_logits(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "BLOCK", LONGEST)
    inputs = case.oracle.inputs("say it now, and say it twice")
    ids = inputs["input_ids"][0]  # [T]
    wanted = case.oracle.logits(inputs)  # [T, V]
    assert case.attached.decoder is not None, "the decoders of these families are standard ones"
    places = torch.arange(len(ids))
    with (
        torch.inference_mode(),
        small_cache(case.attached),
        small_step(case.attached, 0, len(ids)),
    ):
        torch.testing.assert_close(
            case.attached.own_forward(ids, places), wanted, atol=2e-2, rtol=2e-3
        )
        torch.testing.assert_close(case.attached.decoder.forward(ids), wanted, atol=2e-2, rtol=2e-3)


def test_an_item_with_other_places_is_named(case: Case) -> None:
    items = case.prompt().items
    odd = items[0]
    spans = ((odd.spans[0][0], odd.spans[0][1] + 1), *odd.spans[1:])
    longer = MediaItem(odd.modality, "abcdef", spans, odd.inputs)
    with pytest.raises(EngineError, match=f"the {odd.modality} abcdef"):
        case.towers.encode([longer, *items[1:]], None)


# --- what no processor here makes ------------------------------------------------------------------

VIDEO_FAMILIES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen2.5-omni"]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[MediaOracle, Attached]]:
    """By family, those of the tests below."""
    root = tmp_path_factory.mktemp("bare")
    found = {}
    for name in (*VIDEO_FAMILIES, "phi4-multimodal"):
        folder = save_model(root / name, name)
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32")
        found[name] = MediaOracle(folder), load_model(config).attached
    return found


def token(oracle: MediaOracle, *attributes: str) -> int:
    words = oracle.processor.tokenizer
    name = next(getattr(words, a) for a in attributes if hasattr(words, a))
    return int(words.convert_tokens_to_ids(name))


def video_prompt(name: str, oracle: MediaOracle, seconds: float) -> Prompt:
    """Three pairs of frames of 8 x 4 patches; Qwen3-VL has text between them."""
    start = token(oracle, "vision_start_token", "vision_bos_token")
    end = token(oracle, "vision_end_token", "vision_eos_token")
    pad = token(oracle, "video_token")
    grid = torch.tensor([[3, 8, 4]])  # [1, 3]
    runs = [8, 8, 8] if name == "qwen3-vl" else [24]
    ids, spans = [5, 6], []
    for run in runs:
        ids += [7, start]
        spans.append((len(ids), len(ids) + run))
        ids += [pad] * run + [end]
    ids += [8, 9]
    dice = torch.Generator().manual_seed(3)
    inputs = {
        "pixel_values_videos": torch.randn(96, 3 * 2 * 8 * 8, generator=dice),
        "video_grid_thw": grid,
    }
    given = {"qwen2.5-vl": "second_per_grid_ts", "qwen2.5-omni": "video_second_per_grid"}
    if name in given:
        inputs[given[name]] = torch.tensor([seconds])
    tokens = torch.tensor([ids])  # [1, T]
    more = {"attention_mask": torch.ones_like(tokens)}
    if name != "qwen2.5-omni":
        more["mm_token_type_ids"] = 2 * (tokens == pad).int()
    whole = BatchFeature({"input_ids": tokens, **more, **inputs})
    return Prompt(whole, [MediaItem("video", "film", tuple(spans), inputs)])


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_videos_are_the_whole_models(
    name: str, oracles: dict[str, tuple[MediaOracle, Attached]]
) -> None:
    oracle, attached = oracles[name]
    towers: Any = attached.towers
    prompt = video_prompt(name, oracle, 2.0)
    owner: Any = oracle.base if name == "qwen2.5-omni" else oracle.base.model
    seen: dict[str, torch.Tensor] = {}

    def into_decoder(_: Any, inputs: Any, given: dict[str, Any]) -> None:
        seen["positions"] = given["position_ids"][:, 0]  # [3, T]

    hook = oracle.base.get_decoder().register_forward_pre_hook(into_decoder, with_kwargs=True)
    try:
        wanted = features(oracle, prompt)
    finally:
        hook.remove()
    (got,) = towers.encode(prompt.items, None)
    torch.testing.assert_close(got, wanted, **CLOSE)
    positions, shift = towers.rope_index(prompt.ids.tolist(), prompt.items)
    assert positions.tolist() == seen["positions"].tolist() and shift == int(owner.rope_deltas)


class Phi4Images:
    """In the place of Phi-4's image processor, which needs torchvision: every image becomes a crop of
    the whole and one of 2 x 2 tokens, with an end to each of their rows."""

    def __call__(self, images: list[Any], **settings: Any) -> dict[str, Any]:
        dice = torch.Generator().manual_seed(4)
        count = len(images)
        return {
            "image_pixel_values": torch.randn(count, 2, 3, SIDE, SIDE, generator=dice),
            "image_sizes": torch.tensor([[SIDE, SIDE]] * count),
            "image_attention_mask": torch.ones(count, 2, 4, 4, dtype=torch.long),  # none is masked
            "num_img_tokens": [13] * count,
        }

    def to_dict(self) -> dict[str, Any]:
        return {}


def test_phi4_hears_otherwise_beside_images(
    oracles: dict[str, tuple[MediaOracle, Attached]],
) -> None:
    oracle, attached = oracles["phi4-multimodal"]
    towers: Any = attached.towers
    stock: Any = copy(oracle.processor)
    stock.image_processor = Phi4Images()
    words = TextProcessor(stock.tokenizer)
    ours = MediaProcessor(StockProcessor(stock, {}), words, oracle.base.config, ItemCache(1 << 20))
    sound, picture = Audio(random_audio(4), SAMPLING_RATE, "sound"), Image(random_image(5), "image")
    (alone,) = ours.prepare("hear <|audio|> now", [sound]).items
    text = "first <|audio|> then <|image|> now"
    beside, seen = ours.prepare(text, [picture, sound]).items
    (again,) = ours.prepare("hear <|audio|> now", [sound]).items
    assert alone.digest == again.digest != beside.digest and beside.modality == "audio"
    assert "audio_projection_mode" not in again.inputs
    assert ours.prepare("<|image|>", [picture]).items[0].digest == seen.digest

    given = {"text": [text], "images": [picture.pixels], "audio": [sound.samples]}
    prompt = Prompt(stock(**given, return_tensors="pt"), [beside, seen])
    got = towers.encode(prompt.items, None)
    torch.testing.assert_close(together(got), features(oracle, prompt), **CLOSE)
    (heard,) = towers.encode([alone], None)
    whole = make_prompt(oracle, {"audio": [sound.samples]})
    torch.testing.assert_close(heard, features(oracle, whole), **CLOSE)
    assert (heard - got[0]).abs().max() > 0.1
    both = towers.encode([alone, beside], None)
    torch.testing.assert_close(both, [heard, got[0]], **CLOSE)
