"""Adapters with a tokenizer and chat template of their own against transformers and PEFT: offline and
over HTTP, mixed with the base model and adapters that have none."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoProcessor

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config import EngineConfig, LoRAConfig, ServerConfig
from loramux.engine.service import AsyncEngine
from loramux.errors import AdapterRejected, InvalidField
from loramux.server.app import create_app
from loramux.types import AdapterUse
from parity.multimodal import random_image
from parity.multimodal import save_adapter as save_part
from parity.multimodal import save_model as save_multimodal
from parity.own_tokenizers import (
    CHATML,
    SPECIAL,
    WORDS,
    ChatOracle,
    chat_tokenizer,
    save_chat_adapter,
)
from parity.vocabularies import VocabularyOracle
from tiny import TEMPLATE, VOCAB, save_adapter, save_model, tokenizer

COUNT = 12
SHOUT = TEMPLATE.replace("<{{ m['role'] }}>", "{{ m['role'] | upper }}: ")
LORA: dict[str, Any] = {"max_loras": 3, "max_lora_rank": 8, "max_lora_vocabulary_rows": 24}


@dataclass(frozen=True)
class World:
    model: Path
    chat: Path
    shout: Path
    plain: Path
    oracle: ChatOracle

    def folder(self, name: str | None) -> Path | None:
        return {"chat": self.chat, "shout": self.shout, "plain": self.plain}.get(name or "")

    def lora(self, name: str | None) -> LoRARequest | None:
        return None if name is None else LoRARequest(name, lora_path=str(self.folder(name)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("tokenizers")
    model = save_model(root / "model")
    shout = save_adapter(model, root / "shout", seed=3)
    (shout / "chat_template.jinja").write_text(SHOUT)
    plain = save_adapter(model, root / "plain", seed=4)
    tokenizer().save_pretrained(plain)
    chat = save_chat_adapter(model, root / "chat", seed=2)
    return World(model, chat, shout, plain, ChatOracle(model))


@pytest.fixture(scope="module")
def llm(world: World) -> Iterator[LLM]:
    with LLM(str(world.model), enable_lora=True, device="cpu", max_num_seqs=8, **LORA) as made:
        yield made


def _messages() -> list[dict[str, str]]:
    dice = random.Random()
    text = "".join(chr(dice.randrange(97, 123)) for _ in range(dice.randrange(3, 12)))
    return [{"role": "user", "content": f"hello, a bakery {text}?"}]


def _wanted(world: World, name: str | None, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's tokens."""
    if name == "shout":
        base = tokenizer()
        base.chat_template = SHOUT
        text = base.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(base.encode(text, add_special_tokens=False))
    return world.oracle.chat_ids(world.chat if name == "chat" else None, messages)


def test_chat_of_all_in_one_batch(world: World, llm: LLM) -> None:
    names = [None, "chat", "plain", "shout", "chat", None]
    conversations = [_messages() for _ in names]
    end = VOCAB + 1  # <|im_end|>
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=COUNT,
            logprobs=2,
            skip_special_tokens=False,
            logit_bias=tuple({end: 6.0, VOCAB + 2: 5.0}.items()) if name == "chat" else (),
        )
        for name in names
    ]
    loras = [world.lora(name) for name in names]
    outputs = llm.chat(conversations, sampling, lora_request=loras)
    for name, messages, output in zip(names, conversations, outputs, strict=True):
        prompt = _wanted(world, name, messages)
        assert output.prompt_token_ids == prompt, name
        answer = output.outputs[0]
        if name != "chat":
            wanted = VocabularyOracle(world.model).greedy(world.folder(name), prompt, COUNT)
            assert answer.token_ids == wanted[: len(answer.token_ids)]
            continue
        bias = {end: 6.0, VOCAB + 2: 5.0}
        tokens = world.oracle.answer(world.chat, prompt, COUNT, bias=bias)
        assert answer.token_ids == tokens
        shown = tokens[:-1] if tokens[-1] in (end, 2) else tokens
        assert answer.text == world.oracle.written(world.chat, shown, special=True)
        assert answer.finish_reason == ("stop" if len(shown) < len(tokens) else "length")
        made = chat_tokenizer()
        assert answer.logprobs is not None
        for entry in answer.logprobs:
            for token, found in entry.items():
                assert found.decoded_token == made.decode([token])


def test_an_answer_ends_at_the_adapters_eos(world: World, llm: LLM) -> None:
    end = VOCAB + 1
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias=((end, 100.0),))
    lora = world.lora("chat")
    (output,) = llm.chat(_messages(), params, lora_request=lora)
    assert output.outputs[0].token_ids == [end]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "stop")
    going = SamplingParams(temperature=0, max_tokens=3, logit_bias=((end, 100.0),), ignore_eos=True)
    (output,) = llm.chat(_messages(), going, lora_request=lora)
    assert output.outputs[0].token_ids == [end] * 3
    base = SamplingParams(temperature=0, max_tokens=5, logit_bias=((2, 100.0),))
    (output,) = llm.chat(_messages(), base, lora_request=lora)
    assert output.outputs[0].token_ids == [2], "the base model's end is one as well"


def test_texts_are_cut_by_the_adapters_tokenizer(world: World, llm: LLM) -> None:
    text = f"hello to the bakery{SPECIAL[1]}"
    once = SamplingParams(temperature=0, max_tokens=1)
    loras = [None, world.lora("chat"), world.lora("plain")]
    outputs = llm.generate([text] * 3, once, lora_request=loras)
    ids = chat_tokenizer().encode(text)
    assert ids[0] == chat_tokenizer().convert_tokens_to_ids(WORDS[0]) and ids[-1] == VOCAB + 1
    assert [output.prompt_token_ids for output in outputs] == [
        *(tokenizer().encode(text), ids, tokenizer().encode(text))
    ]
    assert llm.get_tokenizer(world.lora("chat")).encode(text) == ids
    assert llm.get_tokenizer().encode(text) == tokenizer().encode(text)
    (vector,) = llm.embed([text], lora_request=world.lora("chat"))
    wanted = world.oracle.hidden(world.chat, ids)  # [D]
    found = torch.tensor(vector.outputs.embedding)  # [D]
    torch.testing.assert_close(found, wanted / wanted.norm(), atol=2e-4, rtol=1e-3)


def test_one_of_a_sum_may_bring_a_tokenizer(world: World, llm: LLM) -> None:
    chat, shout, plain = world.lora("chat"), world.lora("shout"), world.lora("plain")
    once = SamplingParams(temperature=0, max_tokens=1)
    messages = _messages()
    (output,) = llm.chat(messages, once, lora_request=[[plain, chat]])
    assert output.prompt_token_ids == _wanted(world, "chat", messages)
    for call in (llm.chat, llm.generate):
        with pytest.raises(InvalidField, match=r"'chat', 'shout'|'shout', 'chat'"):
            call(messages if call == llm.chat else "x", once, lora_request=[[chat, shout]])
    with pytest.raises(InvalidField, match="tokenizer"):
        llm.generate([[5, 6]], once, lora_request=[[chat, shout]])
    gone = LoRARequest("shout", lora_path=str(world.shout), scale=0.0)
    (output,) = llm.chat(messages, once, lora_request=[[chat, gone]])
    assert output.prompt_token_ids == _wanted(world, "chat", messages)


def test_what_adds_up_to_nothing_brings_no_tokens(world: World, llm: LLM) -> None:
    none = LoRARequest("chat", lora_path=str(world.chat), scale=0.0)
    once = SamplingParams(temperature=0, max_tokens=1)
    (output,) = llm.generate("hello", once, lora_request=none)
    assert output.prompt_token_ids == tokenizer().encode("hello")
    with pytest.raises(InvalidField, match=f"outside the vocabulary of {VOCAB}"):
        llm.generate([[VOCAB + 1]], once, lora_request=none)


# --- over HTTP -------------------------------------------------------------------------------------


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_over_http_and_replaced_meanwhile(world: World, tmp_path: Path) -> None:
    other = save_chat_adapter(
        world.model, tmp_path / "other", seed=9, template=CHATML.replace("\n", " ")
    )
    config = EngineConfig(model=str(world.model), device="cpu", lora=LoRAConfig(**LORA))
    engine = AsyncEngine.create(config)
    app = create_app(engine, ServerConfig(), owns_engine=False)
    bias = {str(VOCAB + 1): 6.0, str(VOCAB + 2): 5.0}
    common = {"temperature": 0, "max_tokens": COUNT, "return_token_ids": True, "logit_bias": bias}
    common |= {"skip_special_tokens": False}

    async def run() -> None:
        await engine.start()
        for name in ("chat", "shout", "plain"):
            await engine.add_adapter(name, str(world.folder(name)))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:

            async def post(path: str, **body: Any) -> httpx.Response:
                return await client.post(f"/v1/{path}", json=common | body, timeout=60)

            await _chats(post)
            await _completions(post, client)
            await _versions(post)
        await engine.stop()

    async def _chats(post: Any) -> None:
        messages = _messages()
        asked = [post("chat/completions", model="chat", messages=messages)]
        asked += [post("chat/completions", model="chat", messages=messages, stream=True)]
        asked += [
            post("chat/completions", model=name, messages=messages, logit_bias=None)
            for name in (str(world.model), "plain", "shout")
        ]
        whole, streamed, base, plain, shout = await asyncio.gather(*asked)
        prompt = world.oracle.chat_ids(world.chat, messages)
        tokens = world.oracle.answer(
            world.chat, prompt, COUNT, bias={int(k): v for k, v in bias.items()}
        )
        shown = tokens[:-1] if tokens[-1] in (VOCAB + 1, 2) else tokens
        text = world.oracle.written(world.chat, shown, special=True)
        reply = whole.json()
        assert reply["prompt_token_ids"] == prompt
        assert reply["choices"][0]["token_ids"] == tokens
        assert reply["choices"][0]["message"]["content"] == text
        pieces = [event["choices"][0]["delta"] for event in _events(streamed.text)]
        assert "".join(piece.get("content", "") for piece in pieces) == text
        assert base.json()["prompt_token_ids"] == plain.json()["prompt_token_ids"]
        assert base.json()["prompt_token_ids"] == _wanted(world, None, messages)
        assert shout.json()["prompt_token_ids"] == _wanted(world, "shout", messages)

    async def _completions(post: Any, client: httpx.AsyncClient) -> None:
        text = f"hello{SPECIAL[0]} a bakery"
        ids = chat_tokenizer().encode(text)
        pooling = {"model": "chat", "input": [text]}
        whole, streamed, summed, pooled = await asyncio.gather(
            post("completions", model="chat", prompt=[text, "x"], logprobs=1),
            post("completions", model="chat", prompt=text, stream=True),
            post("completions", model=str(world.model), prompt=text, lora=["chat", "shout"]),
            client.post("/v1/embeddings", json=pooling, timeout=60),
        )
        reply = whole.json()["choices"]
        assert reply[0]["prompt_token_ids"] == ids
        made = chat_tokenizer()
        assert reply[0]["logprobs"]["tokens"] == [made.decode([t]) for t in reply[0]["token_ids"]]
        found = "".join(event["choices"][0]["text"] for event in _events(streamed.text))
        assert found == reply[0]["text"]
        assert summed.status_code == 400 and "tokenizer" in summed.json()["error"]["message"]
        assert pooled.json()["usage"]["prompt_tokens"] == len(ids)

    async def _versions(post: Any) -> None:
        messages = _messages()
        before = engine.adapters()
        old = {status.ref.name: status.ref.digest for status in before}["chat"]
        hold = engine.hold([AdapterUse("chat")])
        new = await engine.add_adapter("chat", str(other), load_inplace=True)
        assert new.digest != old and new.tokenizer
        held = await engine.render_chat(messages, hold.uses)
        assert held == world.oracle.chat_ids(world.chat, messages)
        seen: list[Any] = []
        params = SamplingParams(temperature=0, max_tokens=2)
        async for _ in engine.generate("r", held, params, hold.uses, seen.extend):
            pass
        assert [ref.digest for ref in seen] == [old]
        hold.release()
        hold.release()
        assert [s.ref.digest for s in engine.residency() if s.ref.name == "chat"] == [new.digest]
        assert engine._engine.require_store().tokenizer(old) is None
        reply = (await post("chat/completions", model="chat", messages=messages)).json()
        assert reply["prompt_token_ids"] == world.oracle.chat_ids(other, messages)

    asyncio.run(run())
    engine._engine.check_integrity()


# --- with media ------------------------------------------------------------------------------------


def test_a_multimodal_model_takes_the_template_alone(tmp_path: Path) -> None:
    model = save_multimodal(tmp_path / "model", "qwen3-vl")
    plain, own, cut = (
        save_part(model, tmp_path / name, "language", seed=5) for name in ("plain", "own", "cut")
    )
    processor = AutoProcessor.from_pretrained(model)
    for folder in (plain, own, cut):
        processor.save_pretrained(folder)
    template = processor.chat_template
    processor.chat_template = "{{ 'adapted: ' }}" + template
    processor.save_pretrained(own)
    words = processor.tokenizer
    words.eos_token = words.convert_ids_to_tokens(7)
    words.save_pretrained(cut)
    image = random_image(3)
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": "a bakery"}]
    asked = [{"type": "image", "image": image}, content[1]]
    once = SamplingParams(temperature=0, max_tokens=2)
    with LLM(str(model), enable_lora=True, device="cpu", max_loras=2, max_lora_rank=8) as llm:
        loras = [LoRARequest(p.name, lora_path=str(p)) for p in (plain, own)]
        turns = [[{"role": "user", "content": content}]] * 3
        outputs = llm.chat(turns, once, lora_request=[None, *loras])
        store = llm.engine.require_store()
        assert len(store._tokenizers) == 1, "the plain one's processor is the base model's"
        for output, text in zip(
            outputs, [template, template, processor.chat_template], strict=True
        ):
            wanted = processor.apply_chat_template(
                [{"role": "user", "content": asked}],
                chat_template=text,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"][0]
            assert output.prompt_token_ids == list(wanted)
        with pytest.raises(AdapterRejected, match="takes media"):
            llm.generate("x", once, lora_request=LoRARequest("cut", lora_path=str(cut)))
