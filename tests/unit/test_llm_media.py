"""Media and default adapters through the offline API, with a processor that is made up.

The model underneath takes text; what it is given instead of a prompt with media is the tokens alone, so
what is compared is what reaches the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config import LoRAConfig
from loramux.engine.media_prompts import MediaPrompts
from loramux.errors import AdapterNotFound, ConfigError, InvalidField
from loramux.types import AdapterUse, MediaItem, MediaPrompt
from media_files import data_url, random_image, random_png
from tiny import TinyWorld

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PLACEHOLDER = 3
SOUND = (np.zeros(50, np.float32), 8000)


class MadeUp:
    """A processor in whose prompts each placeholder becomes two tokens."""

    modalities = frozenset({"image", "audio"})

    def prepare_chat(
        self, messages: Sequence[dict[str, Any]], media: Sequence[Any], **settings: Any
    ) -> MediaPrompt:
        pieces = [part.get("text", "#") for turn in messages for part in turn["content"]]
        text = "".join(pieces) + ("!" if settings["add_generation_prompt"] else "")
        return self.prepare(text, media, add_special_tokens=False)

    def prepare(
        self, prompt: str | Sequence[int], media: Sequence[Any], add_special_tokens: bool = True
    ) -> MediaPrompt:
        given = prompt
        if isinstance(prompt, str):
            given = [1] * add_special_tokens + [
                PLACEHOLDER if letter == "#" else 4 + ord(letter) % 128 for letter in prompt
            ]
        tokens: list[int] = []
        items, left = [], list(media)
        for token in given:
            if token == PLACEHOLDER:
                item = left.pop(0)
                modality: Any = type(item).__name__.lower()
                span = (len(tokens), len(tokens) + 2)
                items.append(MediaItem(modality, item.digest, (span,), {"decoded": item}))
                tokens.append(token)
            tokens.append(token)
        assert not left
        return MediaPrompt(tuple(tokens), tuple(items))


Submitted = list[tuple[MediaPrompt | Sequence[int], list[AdapterUse]]]


def made(monkeypatch: pytest.MonkeyPatch, world: TinyWorld, **settings: Any) -> LLM:
    """An LLM whose model would take images and sound."""
    monkeypatch.setattr(
        "loramux.engine.engine.media_prompts", lambda started: MediaPrompts(MadeUp())
    )
    monkeypatch.setattr(LoRAConfig, "_check_defaults", lambda *_: None)
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    return LLM(model=str(world.model), device="cpu", **{**lora, **settings})


def watched(llm: LLM) -> Submitted:
    """What is submitted from now on; what runs is the tokens."""
    submitted: Submitted = []
    submit = llm.engine.submit

    def note(request_id: str, prompt: Any, params: SamplingParams, uses: Any) -> None:
        submitted.append((prompt, list(uses)))
        return submit(request_id, getattr(prompt, "token_ids", prompt), params, uses)

    llm.engine.submit = note  # type: ignore[method-assign]
    return submitted


@pytest.fixture(scope="module")
def llm(tiny_world: TinyWorld) -> Iterator[LLM]:
    paths = {"image": str(tiny_world.adapters["a"]), "audio": str(tiny_world.adapters["b"])}
    with pytest.MonkeyPatch.context() as patch:
        llm = made(patch, tiny_world, default_mm_loras=paths)
    with llm:
        yield llm
        llm.engine.check_integrity()


def test_prompts_with_media(llm: LLM) -> None:
    submitted = watched(llm)
    image, other = random_image(1), random_image(2)
    outputs = llm.generate(
        [
            {"prompt": "a#b#", "multi_modal_data": {"image": [image, other]}},
            {"prompt_token_ids": [9, PLACEHOLDER], "multi_modal_data": {"audio": SOUND}},
            {"prompt": "plain", "multi_modal_data": None},
        ],
        GREEDY,
    )
    first, second, third = (prompt for prompt, _ in submitted)
    assert isinstance(first, MediaPrompt) and isinstance(second, MediaPrompt)
    assert [item.spans for item in first.items] == [((2, 4),), ((5, 7),)]
    assert first.items[0].inputs["decoded"].pixels.tobytes() == image.tobytes()
    assert second.items[0].modality == "audio" and isinstance(third, list)
    assert outputs[0].prompt == "a#b#" and outputs[1].prompt is None
    assert outputs[0].prompt_token_ids == list(first.token_ids)
    assert outputs[1].prompt_token_ids == [9, PLACEHOLDER, PLACEHOLDER]
    assert all(output.finished for output in outputs)


def test_chat_with_media(llm: LLM) -> None:
    submitted = watched(llm)
    content = [
        {"type": "text", "text": "see"},
        {"type": "image_pil", "image_pil": random_image(1)},
        {"type": "image_url", "image_url": {"url": data_url(random_png(2))}},
    ]
    llm.chat([{"role": "user", "content": content}], GREEDY)
    llm.chat([{"role": "user", "content": "see"}], GREEDY, add_generation_prompt=False)
    (first, _), (second, _) = submitted
    assert isinstance(first, MediaPrompt) and isinstance(second, MediaPrompt)
    assert len(first.items) == 2 and first.token_ids[0] != 1 and len(first.token_ids) == 8
    assert second.items == () and second.token_ids == first.token_ids[:3]


def test_defaults_apply_and_outputs_show_them(llm: LLM, tiny_world: TinyWorld) -> None:
    a, b = str(tiny_world.adapters["a"]), str(tiny_world.adapters["b"])
    submitted = watched(llm)
    prompts = [
        {"prompt": "x#", "multi_modal_data": {"image": random_image(1)}},
        {"prompt": "x#", "multi_modal_data": {"audio": SOUND}},
        {"prompt": "x##", "multi_modal_data": {"audio": SOUND, "image": random_image(1)}},
        "x",
    ]
    outputs = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    for_audio, for_image = LoRARequest("~audio", 1, b), LoRARequest("~image", 2, a)
    shown = [output.lora_request for output in outputs]
    assert shown == [for_image, for_audio, [for_audio, for_image], None]
    assert [output.outputs[0].lora_request for output in outputs] == shown
    assert [[use.name for use in uses] for _, uses in submitted] == [
        ["~image"],
        ["~audio"],
        ["~audio", "~image"],
        [],
    ]
    # The adapter is the one of the folder, under whatever name.
    explicit = llm.generate(prompts[0], GREEDY, lora_request=LoRARequest("mine", 7, a))[0]  # type: ignore[arg-type]
    assert explicit.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert explicit.lora_request == LoRARequest("mine", 7, a)
    # What an output shows may be asked for again.
    again = llm.generate("x", GREEDY, lora_request=for_image)[0]
    assert again.lora_request == for_image


def test_an_explicit_choice_wins(llm: LLM, tiny_world: TinyWorld) -> None:
    submitted = watched(llm)
    prompt = {"prompt": "x#", "multi_modal_data": {"image": random_image(1)}}
    c = LoRARequest("c", 1, str(tiny_world.adapters["c"]))
    llm.generate(prompt, GREEDY, lora_request=c)
    llm.generate(prompt, GREEDY, lora_request=[])
    llm.generate([prompt] * 3, GREEDY, lora_request=[c, [], None])
    chosen = [[use.name for use in uses] for _, uses in submitted]
    assert chosen == [["c"], [], ["c"], [], ["~image"]]


def test_no_request_takes_a_default_name(llm: LLM, tiny_world: TinyWorld) -> None:
    other = LoRARequest("~image", 2, str(tiny_world.adapters["c"]))
    with pytest.raises(InvalidField, match="~image"):
        llm.generate("x", GREEDY, lora_request=other)
    with pytest.raises(InvalidField, match="~new"):
        llm.add_lora(LoRARequest("~new", 1, str(tiny_world.adapters["c"])))
    assert llm.add_lora(LoRARequest("image", 1, str(tiny_world.adapters["c"])))


def test_a_default_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tiny_world: TinyWorld
) -> None:
    with pytest.raises(AdapterNotFound, match="nowhere"):
        made(monkeypatch, tiny_world, default_mm_loras={"image": str(tiny_world.model / "nowhere")})


def test_a_text_model_refuses_defaults_and_media(tiny_world: TinyWorld) -> None:
    with pytest.raises(ConfigError, match="is a text model"):
        LLM(str(tiny_world.model), device="cpu", enable_lora=True, default_mm_loras={"image": "x"})
    with LLM(str(tiny_world.model), device="cpu", limit_mm_per_prompt={"image": 3}) as plain:
        assert plain.config.media.max_items_per_request["image"] == 3
        content = [{"type": "image_pil", "image_pil": random_image(1)}]
        with pytest.raises(InvalidField, match="this is a text model"):
            plain.chat([{"role": "user", "content": content}], GREEDY)
        item = MediaItem("image", "d", ((0, 1),), {})
        with pytest.raises(InvalidField, match="does not take"):
            plain.engine.submit("1", MediaPrompt((5, 6), (item,)), GREEDY)
        assert plain.generate("x", GREEDY)[0].finished


def test_media_settings_in_two_ways_are_refused() -> None:
    from loramux.config import MediaConfig
    from loramux.config.keywords import engine_config

    config = engine_config("m", media=MediaConfig(max_redirects=1))
    assert config.media.max_redirects == 1
    with pytest.raises(ConfigError, match="max_redirects and media"):
        engine_config("m", media=MediaConfig(), max_redirects=1)
