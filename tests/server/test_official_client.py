"""The official `openai` client against a real socket; and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from openai.types.chat import ChatCompletionContentPartParam
from serving import App, LiveServer, wait_until

from loramux.errors import AdapterLoadFailed
from media_files import data_url, random_png, wav

USER = [{"role": "user", "content": "hey"}]


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="org/base", prompt=["ab", "c"], n=2, max_tokens=40, logprobs=1, stop=["zzz"]
    )
    assert [choice.text for choice in answer.choices] == [
        "<base> 0 ba",
        "<base> 1 ba",
        "<base> 0 c",
        "<base> 1 c",
    ]
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens
    assert answer.usage and answer.usage.prompt_tokens == 5


def test_completions_stream(client: openai.OpenAI) -> None:
    text = ""
    for chunk in client.completions.create(
        model="alpha",
        prompt="ab",
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += "".join(choice.text for choice in chunk.choices)
    assert text == "<alpha*1> 0 ba"
    assert chunk.usage and chunk.usage.completion_tokens == len(text)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="org/base",
        messages=USER,
        n=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"lora": [{"name": "alpha", "scale": 0.7}, "beta"], "top_k": 5},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    content = answer.choices[0].message.content
    assert content and content.startswith("<alpha*0.7+beta*1> 0")
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content[0].top_logprobs) == 2


def test_chat_stream(client: openai.OpenAI) -> None:
    roles, text, reasons = [], "", []
    for chunk in client.chat.completions.create(
        model="org/base", messages=USER, stream=True, max_tokens=6
    ):
        choice = chunk.choices[0]
        roles.append(choice.delta.role)
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
    assert roles[0] == "assistant"
    assert text == "<base>"
    assert reasons[-1] == "length"


@pytest.fixture
def seeing() -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    """A client of a model that takes images and sound, with an adapter for each."""
    engine = FakeEngine(
        modalities=["image", "audio"], context=1000, default_mm_loras={"image": "/i", "audio": "/a"}
    )
    with (
        LiveServer(engine, shutdown_timeout_s=0) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, engine


def test_images_and_sound(seeing: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = seeing
    sound = base64.b64encode(wav(bytes(range(100)))).decode()
    parts: list[ChatCompletionContentPartParam] = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": data_url(random_png(1)), "detail": "auto"}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
    ]
    answer = client.chat.completions.create(
        model="org/base", messages=[{"role": "user", "content": parts}]
    )
    content = answer.choices[0].message.content
    assert content and content.startswith("<~audio*1+~image*1> 0")
    assert answer.model_extra and [item["name"] for item in answer.model_extra["lora"]] == [
        "~audio",
        "~image",
    ]
    assert [item.modality for item in engine.seen_media[0]] == ["image", "audio"]
    chunks = client.chat.completions.create(
        model="alpha", messages=[{"role": "user", "content": parts[:2]}], stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "<alpha*1> 0 ]tnatsissa[#####?siht si tahw]resu["


def test_bad_images_are_the_clients_own_errors(
    seeing: tuple[openai.OpenAI, FakeEngine],
) -> None:
    client, engine = seeing
    for url, error, code in (
        ("data:image/png;base64,AAAA", openai.BadRequestError, "invalid_media"),
        ("https://169.254.169.254/", openai.PermissionDeniedError, "forbidden"),
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(
                model="org/base",
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": url}}],
                    }
                ],
            )
        assert caught.value.code == code
        assert caught.value.param == "messages.0.content.0.image_url"
    assert engine.seen == []


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/base", "alpha", "beta"]
    assert client.models.retrieve("alpha").id == "alpha"


def test_errors_are_the_clients_own(client: openai.OpenAI, live: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gamma", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="org/base", prompt="x", extra_body={"no_such": 1})
    assert bad.value.param == "no_such"
    live.engine.fail_at, live.engine.fail_with = 2, AdapterLoadFailed("the disk is gone")
    with pytest.raises(openai.APIError, match="the disk is gone"):
        list(client.completions.create(model="org/base", prompt="x", stream=True))


def test_api_key() -> None:
    with LiveServer(FakeEngine(), api_key="right") as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="right") as client:
            assert client.models.list().data
        with (
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_many_streams_at_once(live: LiveServer) -> None:
    live.engine.delay_s = 0.002

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        model = ("org/base", "alpha", "beta")[number % 3]
        stream = await client.completions.create(
            model=model, prompt=str(number), stream=True, max_tokens=40
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(24))))

    for number, text in enumerate(asyncio.run(everyone())):
        who = ("base", "alpha*1", "beta*1")[number % 3]
        assert text == f"<{who}> 0 {str(number)[::-1]}"


def _raw_post(live: LiveServer, body: dict[str, object]) -> socket.socket:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=5)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("delay_s", [0.05, 30.0])
def test_a_client_that_leaves_cancels_its_request(
    live: LiveServer, stream: bool, delay_s: float
) -> None:
    """Also one that waits for its first token (30 s here), and with several prompts."""
    live.engine.delay_s = delay_s
    body = {"model": "alpha", "prompt": ["a" * 90, "b"], "stream": stream, "max_tokens": 90}
    connection = _raw_post(live, body)
    wait_until(lambda: live.engine.running == 2)
    if stream and delay_s < 1:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: live.engine.running == 0, timeout_s=3)
    assert live.engine.cancelled == 2
    metrics = httpx.get(f"{live.url}/metrics").text
    assert 'loramux_requests_total{adapter="alpha",finish_reason="abort"} 2.0' in metrics


def test_one_failing_prompt_ends_its_siblings(engine: FakeEngine, app: App) -> None:
    engine.fail_at = 3
    engine.delay_s = 0.001
    assert app.complete(prompt=["a", "b", "c"]).status_code == 503
    assert engine.running == 0
