"""Images and sound through `loramux serve`, by the official client, against transformers and PEFT."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from parity.multimodal import (
    SAMPLING_RATE,
    MediaOracle,
    random_audio,
    random_image,
    save_adapter,
    save_model,
)

COUNT = 5
NAME = "qwen2.5-omni"  # it takes both


def wav(samples: np.ndarray) -> bytes:
    """A WAV file of float32 samples."""
    data = samples.astype("<f4").tobytes()
    layout = np.array([3, 1], "<u2").tobytes()
    layout += np.array([SAMPLING_RATE, 4 * SAMPLING_RATE], "<u4").tobytes()
    layout += np.array([4, 32], "<u2").tobytes()
    chunks = b"WAVEfmt " + np.uint32(len(layout)).tobytes() + layout
    chunks += b"data" + np.uint32(len(data)).tobytes() + data
    return b"RIFF" + np.uint32(len(chunks)).tobytes() + chunks


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def image_part(image: Image.Image) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(samples: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(wav(samples)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


@dataclass(frozen=True)
class Served:
    client: openai.OpenAI
    oracle: MediaOracle

    def answer(self, parts: list[dict[str, Any]], **more: Any) -> Any:
        extra = {"ignore_eos": True, "return_token_ids": True, **more}
        return self.client.chat.completions.create(
            model="omni",
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
            temperature=0,
            max_tokens=COUNT,
            extra_body=extra,
        )

    def wanted(
        self, types: list[str], media: dict[str, Any], composition: dict[str, float]
    ) -> list[int]:
        """Of a message of a text and then parts of these types."""
        parts = [{"type": "text", "text": "what is"}, *({"type": kind} for kind in types)]
        inputs = self.oracle.inputs([{"role": "user", "content": parts}], **media)
        return self.oracle.greedy(inputs, COUNT, composition)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("media")
    folder = save_model(root / "model", NAME)
    adapters = {
        name: save_adapter(folder, root / name, "language", seed=seed)
        for seed, name in enumerate(("seen", "heard"))
    }
    command = [sys.executable, "-m", "loramux", "serve", str(folder), "--port", "0"]
    command += ["--device", "cpu", "--dtype", "float32", "--served-model-name", "omni"]
    command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    defaults = {"image": str(adapters["seen"]), "audio": str(adapters["heard"])}
    command += ["--default-mm-loras", json.dumps(defaults)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = ""
    while not line.startswith("Listening on "):
        line = process.stdout.readline()
        assert line, "the server ended before it listened"
    url = line.removeprefix("Listening on ").strip()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    try:
        yield Served(client, MediaOracle(folder, adapters))
    finally:
        process.terminate()
        assert process.wait(60) == 0


TEXT = {"type": "text", "text": "what is"}


def test_modalities_bring_their_adapters_and_several_their_sum(served: Served) -> None:
    image, sound = random_image(3), random_audio(4)
    seen, heard = {"images": [image]}, {"audio": [sound]}
    cases: list[tuple[list[Any], list[str], dict[str, Any], dict[str, float]]] = [
        ([TEXT, image_part(image)], ["image"], seen, {"seen": 1.0}),
        ([TEXT, audio_part(sound)], ["audio"], heard, {"heard": 1.0}),
        (
            [TEXT, image_part(image), audio_part(sound)],
            ["image", "audio"],
            seen | heard,
            {"seen": 1.0, "heard": 1.0},
        ),
    ]
    answers = []
    for parts, types, media, composition in cases:
        answer = served.answer(parts)
        answers.append(answer.choices[0].token_ids)
        assert answers[-1] == served.wanted(types, media, composition)
        names = {used["name"] for used in answer.lora}
        assert names == {{"seen": "~image", "heard": "~audio"}[name] for name in composition}
    assert len({tuple(ids) for ids in answers}) > 1
    base = served.answer([TEXT, image_part(image)], lora=[])
    assert base.choices[0].token_ids == served.wanted(["image"], seen, {})


def test_what_cannot_be_read_is_the_clients_fault_and_nobody_elses(served: Served) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    inside = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    cut = image_part(random_image(1))
    cut["image_url"]["url"] = cut["image_url"]["url"][:-400]
    for part in (broken, inside, cut, image_part(random_image(1)) | {"image_url": {"url": ""}}):
        with pytest.raises(openai.APIStatusError) as caught:
            served.answer([TEXT, part])
        assert 400 <= caught.value.status_code < 500
        assert "content" in str(caught.value.body)
    many = [image_part(random_image(seed, 8, 8)) for seed in range(12)]
    with pytest.raises(openai.BadRequestError, match="12 of image"):
        served.answer([TEXT, *many])
    assert served.answer([TEXT]).choices[0].token_ids == served.wanted([], {}, {})
