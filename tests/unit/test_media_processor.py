"""The processor of a multimodal model: what it refuses and remembers, and which checkpoints it reads."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from loramux.errors import BadMedia, ConfigError, InvalidField, UnsupportedModel
from loramux.media import Audio, Image, Video
from loramux.models.granite_sounds import TorchGraniteSpeechFeatureExtractor
from loramux.models.item_cache import ItemCache, ProcessedItem
from loramux.models.placeholders import Expansion
from loramux.models.processor import MediaProcessor, load_processor
from loramux.models.resample import resample
from parity.multimodal import FAMILIES, random_audio, random_image, save_model
from parity.multimodal_processors import NumpyGraniteSpeechFeatureExtractor

WITHOUT_TORCHVISION = pytest.mark.skipif(
    find_spec("torchvision") is not None, reason="torchvision is there"
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).exists() else save_model(root / name, name)


def load(folder: Path, **settings: Any) -> MediaProcessor:
    return load_processor(str(folder), None, AutoConfig.from_pretrained(folder), **settings)


@pytest.fixture
def llava(folder_of: Callable[[str], Path]) -> MediaProcessor:
    return load(folder_of("llava-next"))


def an_image(seed: int = 0, width: int = 60, height: int = 40) -> Image:
    return Image(random_image(seed, width, height), f"image {seed} {width} {height}")


def a_sound(seconds: float = 0.6, rate: int = 16000) -> Audio:
    wave = np.sin(np.arange(int(seconds * rate)) / 7).astype(np.float32)
    return Audio(wave, rate, f"sound {seconds} {rate}")


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0, 1, 3])
def test_as_many_items_as_placeholders(llava: MediaProcessor, given: int) -> None:
    images = [an_image(seed) for seed in range(given)]
    counts = rf"images: 2 in the prompt, {given} given.*<image>"
    for prompt in ("<image> or <image>", llava.text.encode("<image> or <image>")):
        with pytest.raises(InvalidField, match=counts) as caught:
            llava.prepare(prompt, images, field="messages")
        assert caught.value.field == "messages"


def test_every_modality_is_counted(folder_of: Callable[[str], Path]) -> None:
    omni = load(folder_of("qwen2.5-omni"))
    with pytest.raises(
        InvalidField, match=r"images: 0 in the prompt, 1 given; sounds: 2 .*, 1 given"
    ):
        omni.prepare("<|AUDIO|><|AUDIO|>", [an_image(), a_sound()])


def test_modalities_that_the_model_does_not_take_are_refused(llava: MediaProcessor) -> None:
    assert llava.modalities == {"image"}
    with pytest.raises(InvalidField, match="takes images, but no sounds"):
        llava.prepare("hear", [a_sound()])
    with pytest.raises(InvalidField, match="takes images, but no videos"):
        llava.placeholder("video")


@WITHOUT_TORCHVISION
def test_videos_are_refused_by_what_they_need(folder_of: Callable[[str], Path]) -> None:
    qwen = load(folder_of("qwen2-vl"))
    video = Video((random_image(1), random_image(2)), "video")
    for refused in (
        lambda: qwen.prepare("<|video_pad|>", [video]),
        lambda: qwen.render([{"role": "user", "content": [{"type": "video"}]}]),
    ):
        with pytest.raises(InvalidField, match=r"takes videos, but .* needs torchvision"):
            refused()
    with pytest.raises(InvalidField, match="videos: 1 in the prompt, 0 given"):
        qwen.prepare("<|video_pad|>", [])
    # Where it is no token, it is text like any other.
    smolvlm = load(folder_of("smolvlm"))
    assert smolvlm.prepare("a <video> tag", []).token_ids == tuple(
        smolvlm.text.encode("a <video> tag")
    )


@WITHOUT_TORCHVISION
def test_a_model_none_of_whose_media_can_be_had_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = edited(folder_of("llava-next"), tmp_path, image_processor_type="Lfm2VlImageProcessor")
    with pytest.raises(UnsupportedModel, match="install torchvision"):
        load(folder)


def test_tokens_of_media_that_nobody_gave_are_refused(folder_of: Callable[[str], Path]) -> None:
    gemma = load(folder_of("gemma3"))
    for media, prompt in (
        ([], "<image_soft_token>"),
        ([an_image()], "<start_of_image><image_soft_token>"),
    ):
        with pytest.raises(InvalidField, match="stand for media"):
            gemma.prepare(prompt, media)
    expanded = gemma.prepare("<start_of_image>", [an_image()]).token_ids
    with pytest.raises(InvalidField, match="stand for media"):
        gemma.prepare(expanded, [an_image()])


def test_items_that_the_model_cannot_take_are_refused(folder_of: Callable[[str], Path]) -> None:
    qwen, audio = load(folder_of("qwen2-vl")), load(folder_of("qwen2-audio"))
    with pytest.raises(BadMedia, match=r"refuses the image: .*aspect ratio") as caught:
        qwen.prepare("<|image_pad|>", [an_image(0, 4000, 2)], field="messages")
    assert caught.value.field == "messages"
    with pytest.raises(BadMedia, match=r"lasts 1\.2 s, and this model hears 1 s"):
        audio.prepare("<|AUDIO|>", [a_sound(1.2)])
    with pytest.raises(BadMedia, match="too short"):
        audio.prepare("<|AUDIO|>", [a_sound(0.005)])


def test_folders_without_a_processor_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(folder_of("llava-next"))
    with pytest.raises(ConfigError, match="no processor can be read"):
        load_processor(str(tmp_path), None, config)
    unknown = edited(
        folder_of("llava-next"), tmp_path / "unknown", processor_class="NoSuchProcessor"
    )
    with pytest.raises(UnsupportedModel, match="NoSuchProcessor"):
        load(unknown)


# --- which checkpoints are read ----------------------------------------------------------------


def edited(folder: Path, to: Path, **changes: str) -> Path:
    """A copy whose processor's settings, or their part for images, have `changes`."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    settings = json.loads((to / "processor_config.json").read_text())
    for key, value in changes.items():
        (settings["image_processor"] if key in settings["image_processor"] else settings)[key] = (
            value
        )
    (to / "processor_config.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize("suffix", ["", "Fast"])
def test_checkpoints_in_the_older_format_are_read(
    folder_of: Callable[[str], Path], tmp_path: Path, suffix: str
) -> None:
    """Settings in preprocessor_config.json, the template in a JSON file."""
    new = folder_of("qwen2-vl")
    shutil.copytree(new, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    settings |= {"image_processor_type": f"Qwen2VLImageProcessor{suffix}"}
    settings |= {"processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template + "OLD"}))
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    prompt, media = "<|image_pad|>\n<|image_pad|>", [an_image(1), an_image(2, 90, 50)]
    old = load(tmp_path)
    assert old.prepare(prompt, media) == load(new).prepare(prompt, media)
    assert old.render([{"role": "user", "content": "hi"}]).endswith("OLD")


def test_a_template_of_the_operators_goes_first(folder_of: Callable[[str], Path]) -> None:
    mine = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    processor = load(folder_of("llava-next"), chat_template=mine)
    assert processor.render([{"role": "user", "content": "hi"}]) == "hi!"
    made = processor.prepare_chat(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}],
        [an_image()],
    )
    assert made == processor.prepare("<image>\nhi!", [an_image()])


def test_special_tokens_stand_before_a_conversation_once(llava: MediaProcessor) -> None:
    assert llava.adds_special_tokens("<user>hi")
    assert not llava.adds_special_tokens("<bos><user>hi")


def test_granites_features_are_the_same_without_torchaudio() -> None:
    dice = np.random.default_rng()
    sounds = [random_audio(int(dice.integers(1 << 30)), s) for s in dice.uniform(0.2, 3, 3)]
    theirs = NumpyGraniteSpeechFeatureExtractor()  # in float64
    for sound in sounds:
        made, wanted = TorchGraniteSpeechFeatureExtractor()([sound]), theirs([sound])
        assert made["audio_embed_sizes"] == wanted["audio_embed_sizes"]
        assert torch.equal(made["input_features_mask"], wanted["input_features_mask"])
        torch.testing.assert_close(
            made["input_features"], wanted["input_features"], atol=1e-4, rtol=1e-4
        )


# --- sounds at another rate --------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 44100])
def test_sounds_are_given_to_the_model_at_its_rate(
    folder_of: Callable[[str], Path], rate: int
) -> None:
    processor = load(folder_of("qwen2-audio"))
    samples = np.sin(np.arange(int(0.7 * rate)) * 2 * np.pi * 440 / rate).astype(np.float32)
    exact = resample(samples, rate, 16000)
    made, wanted = (
        processor.prepare("<|AUDIO|>", [sound])
        for sound in (Audio(samples, rate, "a"), Audio(exact, 16000, "b"))
    )
    assert made.token_ids == wanted.token_ids
    for name, value in wanted.items[0].inputs.items():
        assert torch.equal(made.items[0].inputs[name], value)


# --- what is remembered ------------------------------------------------------------------------


def counting(processor: MediaProcessor) -> list[int]:
    """A list that grows with every call of the stock processor."""
    calls: list[int] = []
    stock = processor._items.stock

    def call(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return stock(*args, **settings)

    processor._items.stock = call
    return calls


def test_an_item_seen_again_costs_no_processing(llava: MediaProcessor) -> None:
    calls = counting(llava)
    first = llava.prepare("<image>\n<image>", [an_image(1), an_image(2)])
    assert len(calls) == 2
    second = llava.prepare("so <image>", [an_image(2)])
    assert len(calls) == 2
    assert second.items[0].inputs is first.items[1].inputs
    assert second.items[0].digest == first.items[1].digest
    assert second.items[0].spans != first.items[1].spans


def test_nothing_is_remembered_in_no_bytes(folder_of: Callable[[str], Path]) -> None:
    processor = load(folder_of("llava-next"), cache_bytes=0)
    calls = counting(processor)
    made = [processor.prepare("<image>", [an_image()]) for _ in range(2)]
    assert len(calls) == 2 and made[0] == made[1]


def test_the_least_recently_asked_for_goes_first() -> None:
    def item(count: int) -> ProcessedItem:
        whole = torch.zeros(count, dtype=torch.uint8)  # [count]
        return ProcessedItem({"part": whole[: count // 2], "rest": whole[1:]}, Expansion("", (), 0))

    cache = ItemCache(100)
    for name in "abc":
        cache.put(name, item(30))
    assert cache.num_bytes == 90 and cache.get("a") is not None
    cache.put("d", item(40))
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert cache.num_bytes == 100
    cache.put("e", item(101))
    assert cache.get("e") is None and len(cache) == 3
    cache.put("a", item(99))  # another thread was faster
    assert cache.num_bytes == 100


def test_digests_stand_for_content_and_settings(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("llava-next")
    other = edited(folder, tmp_path, image_mean=[0.1, 0.2, 0.3])  # type: ignore[arg-type]

    def digest(where: Path, image: Image) -> str:
        return load(where).prepare("<image>", [image]).items[0].digest

    same = Image(random_image(5), an_image().digest)  # said to be equal
    digests = [digest(folder, an_image()), digest(folder, an_image(1)), digest(other, an_image())]
    assert len(set(digests)) == 3
    assert digest(folder, same) == digests[0]


@pytest.mark.parametrize("name", ["llava-next", "idefics3", "qwen2.5-omni", "granite-speech"])
def test_threads_do_not_disturb_each_other(name: str, folder_of: Callable[[str], Path]) -> None:
    dice = random.Random()
    kinds = list(FAMILIES[name].prompts)

    def random_item(seed: int) -> Image | Audio:
        if dice.choice(kinds) == "audio":
            return Audio(random_audio(seed, dice.uniform(0.2, 0.9)), 16000, f"sound {seed}")
        return an_image(seed, dice.randrange(20, 120), dice.randrange(20, 120))

    processor = load(folder_of(name), cache_bytes=200_000)
    pool = [random_item(seed) for seed in range(8)]
    asked = []
    for _ in range(40):
        media = dice.choices(pool, k=dice.randrange(4))
        tags = [processor.placeholder("image" if isinstance(m, Image) else "audio") for m in media]
        asked.append(("say\n" + "\n".join(tags), media))
    alone = load(folder_of(name), cache_bytes=0)
    wanted = [alone.prepare(*question) for question in asked]
    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda question: processor.prepare(*question), asked))
    assert made == wanted
    for ours, theirs in zip(made, wanted, strict=True):
        for item, its in zip(ours.items, theirs.items, strict=True):
            assert all(torch.equal(item.inputs[key], its.inputs[key]) for key in its.inputs)
