"""Prompts with media against the stock processors: the same tokens, the same inputs an item, and spans
that are exactly the tokens which stand for vectors."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerFast

from loramux.errors import UnsupportedModel
from loramux.media import Audio, Image, Video
from loramux.models.media_items import OF_THE_TEXT
from loramux.models.processor import MediaProcessor, load_processor
from loramux.types import MediaPrompt
from parity.multimodal import FAMILIES, random_audio, random_image, save_model
from parity.multimodal_processors import SAMPLING_RATE, tokenizer
from parity.multimodal_processors import load_processor as load_by_pil

SERVED = [name for name in FAMILIES if name != "paligemma"]
ATTRIBUTES = ("context_image_token", "image_token", "audio_token")


def stock_processor(folder: Path) -> Any:
    """As transformers loads it; without torchvision with PIL for the images."""
    alone = load_by_pil(folder)
    return alone if find_spec("torchvision") is None else AutoProcessor.from_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """A family's processor twice: ours and the stock one."""

    name: str
    folder: Path
    ours: MediaProcessor
    stock: Any

    @property
    def prompts(self) -> dict[str, str]:
        return FAMILIES[self.name].prompts

    @property
    def vector_ids(self) -> list[int]:
        words = self.stock.tokenizer
        tokens = [getattr(words, a) for a in ATTRIBUTES if hasattr(words, a)]
        return [words.convert_tokens_to_ids(token) for token in tokens]

    def stock_inputs(self, text: str, media: list[Image | Audio]) -> Any:
        given: dict[str, Any] = {}
        images = [item.pixels for item in media if isinstance(item, Image)]
        audio = [item.samples for item in media if isinstance(item, Audio)]
        if images:
            given["images"] = images
        if audio:
            given["audio"] = audio
            if "feature_extractor" in self.stock.get_attributes():
                given["sampling_rate"] = SAMPLING_RATE
        return self.stock(text=[text], return_tensors="pt", **given)


def load_case(name: str, folder: Path) -> Case:
    ours = load_processor(str(folder), None, AutoConfig.from_pretrained(folder))
    return Case(name, folder, ours, stock_processor(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_model(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="module", params=SERVED)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Case:
    return load_case(request.param, folders[request.param])


def random_item(modality: str, dice: random.Random) -> Image | Audio:
    seed = dice.randrange(1 << 30)
    if modality == "audio":
        samples = random_audio(seed, dice.uniform(0.2, 0.95))
        return Audio(samples, SAMPLING_RATE, f"sound {seed}")
    size = dice.randrange(17, 150), dice.randrange(17, 150)
    return Image(random_image(seed, *size), f"image {seed}")


def random_prompt(case: Case, dice: random.Random, count: int) -> tuple[str, list[Image | Audio]]:
    """Text with `count` items of random modalities, and these."""
    text, media = dice.choice(["", "see ", "\n", "one\n\n"]), []
    for _ in range(count):
        modality = dice.choice(list(case.prompts))
        media.append(random_item(modality, dice))
        text += case.prompts[modality] + dice.choice(["", " and ", "\n", "\n\n", "\n\n\nor\n"])
    return text + dice.choice(["", "what?", "\nwhat?\n"]), media


def span_indices(prompt: MediaPrompt) -> list[int]:
    spans = [span for item in prompt.items for span in item.spans]
    return [index for start, stop in spans for index in range(start, stop)]


def assert_same_inputs(case: Case, item: Any, media: Image | Audio) -> None:
    """As those that the stock processor makes of this item alone."""
    alone = case.stock_inputs(case.prompts[item.modality], [media])
    wanted = {name: value for name, value in alone.items() if name not in OF_THE_TEXT}
    assert set(item.inputs) == set(wanted)
    # The tests have Granite's features in float64; torchaudio and we compute in float32.
    close = 1e-4 if case.name == "granite-speech" else 0.0
    for name, value in wanted.items():
        torch.testing.assert_close(item.inputs[name], value, atol=close, rtol=close, msg=name)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_prompts_are_those_of_the_stock_processor(case: Case, count: int) -> None:
    dice = random.Random()
    for _ in range(3):
        text, media = random_prompt(case, dice, count)
        wanted = case.stock_inputs(text, media)["input_ids"][0]  # [N]
        made = case.ours.prepare(text, media)
        assert list(made.token_ids) == wanted.tolist(), text
        stand_for_vectors = torch.isin(wanted, torch.tensor(case.vector_ids))  # [N]
        assert span_indices(made) == stand_for_vectors.nonzero()[:, 0].tolist()
        in_order = [
            case.ours.prepare(case.prompts[i.modality], [m])
            for i, m in zip(made.items, media, strict=True)
        ]
        assert [item.digest for item in made.items] == [p.items[0].digest for p in in_order]
        assert [item.num_vectors for item in made.items] == [
            p.items[0].num_vectors for p in in_order
        ]
        for item, its in zip(made.items, media, strict=True):
            assert_same_inputs(case, item, its)


def test_media_may_come_in_any_order_of_modalities(folders: dict[str, Path]) -> None:
    case = load_case("qwen2.5-omni", folders["qwen2.5-omni"])
    dice = random.Random()
    kinds = ["image", "audio", "audio", "image", "audio"]
    media = [random_item(modality, dice) for modality in kinds]
    text = "\n".join(case.prompts[modality] for modality in kinds)
    made = case.ours.prepare(text, media)
    assert [item.modality for item in made.items] == kinds
    sorted_media = sorted(media, key=lambda item: isinstance(item, Image))
    assert case.ours.prepare(text, sorted_media) == made


def test_prompts_of_tokens_are_expanded_too(case: Case) -> None:
    text, media = random_prompt(case, random.Random(), 3)
    made = case.ours.prepare(text, media)
    ids = case.ours.text.encode(text)
    assert len(ids) < len(made.token_ids) or case.name == "granite-speech"
    assert case.ours.prepare(ids, media) == made


def test_a_prompt_without_media_is_the_tokenizers(case: Case) -> None:
    text = "no media\n\nhere"
    made = case.ours.prepare(text, [])
    assert made.items == () and list(made.token_ids) == case.stock.tokenizer(text)["input_ids"]


def test_conversations_are_those_of_the_stock_processor(case: Case) -> None:
    dice = random.Random()
    media = [random_item(modality, dice) for modality in case.prompts]
    parts = [{"type": modality} for modality in case.prompts]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [*parts, {"type": "text", "text": "what\nis it?"}]},
    ]
    text = case.stock.apply_chat_template(
        messages, case.stock.tokenizer.chat_template, add_generation_prompt=True
    )
    made = case.ours.prepare_chat(messages, media)
    assert list(made.token_ids) == case.stock_inputs(text, media)["input_ids"][0].tolist()
    assert [item.modality for item in made.items] == list(case.prompts)


def test_placeholders_have_the_tags_of_the_family(case: Case) -> None:
    taken = {modality: case.ours.placeholder(modality) for modality in case.prompts}
    assert taken == case.prompts


def test_a_processor_that_changes_more_of_a_prompt_is_refused(folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(folders["paligemma"])
    with pytest.raises(UnsupportedModel, match=r"PaliGemmaProcessor.*more of a prompt"):
        load_processor(str(folders["paligemma"]), None, config)


def merging_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with line ends that join, and a first token of its own before each text."""
    words = tokenizer(FAMILIES[name].tokens, FAMILIES[name].more_tokens)
    whole = json.loads(words.backend_tokenizer.to_str())
    vocab = whole["model"]["vocab"]
    for index, joined in enumerate(["ĊĊ", "ĊĊĊ"]):
        vocab[joined] = vocab.pop(f"<extra_{300 + index}>")
    whole["model"]["merges"] = [["Ċ", "Ċ"], ["ĊĊ", "Ċ"]]
    backend = Tokenizer.from_str(json.dumps(whole))
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=FAMILIES[name].tokens,
    )


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava", "qwen2.5-omni"])
def test_texts_join_with_what_a_processor_writes(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    processor = FAMILIES[name].processor(merging_tokenizer(name))
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(folders[name])
    case = Case(
        name, tmp_path, load_processor(str(tmp_path), None, config), stock_processor(tmp_path)
    )
    token = case.prompts["image"]
    dice = random.Random()
    media = [random_item("image", dice), random_item("image", dice)]
    for text in (f"{token}\n{token}", f"so\n{token}\n\n\n{token}\n\nwhat?"):
        made = case.ours.prepare(text, media)
        assert list(made.token_ids) == case.stock_inputs(text, media)["input_ids"][0].tolist()
        assert made.token_ids[0] == 1
        assert (
            case.ours.prepare(text, media, add_special_tokens=False).token_ids == made.token_ids[1:]
        )


# --- in a process that has nothing of the tests in it ------------------------------------------

ELSEWHERE = """
import json, sys
import numpy as np, PIL.Image, transformers
from transformers import AutoConfig
from transformers.models.auto import image_processing_auto, processing_auto, video_processing_auto
from loramux.media import Audio, Image
from loramux.models.processor import load_processor

registries = [
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
    processing_auto.PROCESSOR_MAPPING,
]
names = ["BaseVideoProcessor", "PixtralProcessor", "AutoImageProcessor"]
before = [getattr(transformers, name) for name in names]
picture = PIL.Image.fromarray(np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3))
sound = np.sin(np.arange(9999) / 5).astype("f")
media = {"image": Image(picture, "i"), "audio": Audio(sound, 16000, "a")}
made = {}
for name, folder, modalities in json.loads(sys.argv[1]):
    processor = load_processor(folder, None, AutoConfig.from_pretrained(folder))
    prompt = "see " + " and ".join(processor.placeholder(m) for m in modalities)
    made[name] = processor.prepare(prompt, [media[m] for m in modalities]).token_ids
assert not any(registry._extra_content for registry in registries)
assert [getattr(transformers, name) for name in names] == before
alias = sys.modules.get("transformers.models.pixtral.image_processing_pixtral")
assert alias is None or alias.__name__.endswith("image_processing_pixtral")
smolvlm = sys.modules["transformers.models.smolvlm.processing_smolvlm"]
assert smolvlm.num2words is not str
print(json.dumps(made))
"""


def test_loading_needs_no_preparation_and_leaves_transformers_as_it_was(
    folders: dict[str, Path],
) -> None:
    asked = [(name, str(folders[name]), list(FAMILIES[name].prompts)) for name in SERVED]
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    made = json.loads(ran.stdout.splitlines()[-1])
    pixels = np.arange(90 * 70 * 3, dtype=np.uint8).reshape(90, 70, 3)
    media = {
        "image": Image(PIL.Image.fromarray(pixels), "i"),
        "audio": Audio(np.sin(np.arange(9999) / 5).astype(np.float32), SAMPLING_RATE, "a"),
    }
    for name, _, modalities in asked:
        case = load_case(name, folders[name])
        prompt = "see " + " and ".join(case.prompts[m] for m in modalities)
        wanted = case.stock_inputs(prompt, [media[m] for m in modalities])["input_ids"][0]
        assert made[name] == wanted.tolist(), name


# --- videos, whose processors all need torchvision ---------------------------------------------

VIDEO = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "smolvlm", "qwen2.5-omni"]


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
@pytest.mark.parametrize("name", VIDEO)
def test_videos_are_those_of_the_stock_processor(name: str, folders: dict[str, Path]) -> None:
    case = load_case(name, folders[name])
    dice = random.Random()
    videos = []
    for count in (4, 5):
        seeds = [dice.randrange(1 << 30) for _ in range(count)]
        frames = tuple(random_image(seed, 40 + count, 3) for seed in seeds)
        videos.append(Video(frames, f"video {seeds}"))
    token = case.ours.placeholder("video")
    for some in (videos[:1], [videos[0], videos[0]]):
        text = "see\n" + f"{token}\n\nand ".join([""] * (len(some) + 1))
        arrays = [np.stack([np.asarray(frame) for frame in video.frames]) for video in some]
        settings = {"do_sample_frames": False, "input_data_format": "channels_last"}
        wanted = case.stock(
            text=[text], videos=[arrays], return_tensors="pt", videos_kwargs=settings
        )
        made = case.ours.prepare(text, some)
        assert list(made.token_ids) == wanted["input_ids"][0].tolist()
    for video in videos:
        item = case.ours.prepare(token, [video]).items[0]
        assert item.modality == "video" and item.num_vectors > 0
        array = np.stack([np.asarray(frame) for frame in video.frames])
        alone = case.stock(
            text=[token], videos=[[array]], return_tensors="pt", videos_kwargs=settings
        )
        wanted = {key: value for key, value in alone.items() if key not in OF_THE_TEXT}
        assert set(wanted) == set(item.inputs)
        for key, value in wanted.items():
            torch.testing.assert_close(item.inputs[key], value, atol=0, rtol=0)
