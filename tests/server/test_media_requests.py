"""Images, sounds and videos in chat requests: decoded in order, or refused before the engine hears."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, reference
from serving import App, LiveServer, events_of, wait_until

from loramux.config import MediaConfig
from loramux.errors import AdapterNotFound
from loramux.media import MediaLoader
from loramux.server import media_loading, run
from media_files import data_url, encoded, png_by_hand, random_image, random_png, wav
from media_hosts import Internet, internet_of, ok

ALL = ("image", "audio", "video")
SOUND = wav(bytes(range(200)))
FRAME = base64.b64encode(encoded(random_image(9), "JPEG")).decode()

Part = dict[str, Any]


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def image(seed: int = 1) -> Part:
    return {"type": "image_url", "image_url": {"url": data_url(random_png(seed))}}


def sound() -> Part:
    encoded_sound = base64.b64encode(SOUND).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded_sound, "format": "wav"}}


def sound_url() -> Part:
    return {"type": "audio_url", "audio_url": {"url": data_url(SOUND, "audio/wav")}}


def video() -> Part:
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{FRAME},{FRAME}"}}


def user(*parts: Part) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(modalities=ALL, context=1000)


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    with internet_of(monkeypatch) as internet:
        yield internet


def prompt_of(engine: FakeEngine, request: int = -1) -> str:
    return "".join(map(chr, engine.seen[request][2][1:]))


def check_refused(engine: FakeEngine, response: httpx.Response, param: str, said: str) -> None:
    """A 4xx in OpenAI's shape that names the field; nothing has reached the engine."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert said in error["message"], error
    assert engine.seen == [] and engine.seen_media == []


# --- what is served ----------------------------------------------------------------------------


def test_media_reach_the_engine_decoded_and_in_order(engine: FakeEngine, app: App) -> None:
    loader = MediaLoader(MediaConfig())
    messages = [
        {"role": "system", "content": "be short"},
        *user(text("a"), image(1), text("b"), sound(), image(2)),
        {"role": "assistant", "content": "fine"},
        *user(video(), sound_url(), text("c")),
    ]
    answer = app.chat(messages=messages)
    assert answer.status_code == 200, answer.text
    assert prompt_of(engine) == (
        "[system]be short[user]a#####b##########[assistant]fine[user]##########c[assistant]"
    )
    [items] = engine.seen_media
    assert [item.modality for item in items] == ["image", "audio", "image", "video", "audio"]
    decoded = [item.inputs["decoded"] for item in items]
    expected = [
        loader.image(data_url(random_png(1))),
        loader.audio(data_url(SOUND, "audio/wav")),
        loader.image(data_url(random_png(2))),
    ]
    assert decoded[:3] == expected and decoded[4] == expected[1]
    assert decoded[2].pixels.tobytes() == random_image(2).tobytes()
    assert len(decoded[3].frames) == 2
    # Placeholders count as they are written out.
    assert answer.json()["usage"]["prompt_tokens"] == len(engine.seen[0][2])


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_a_prompt_with_media(engine: FakeEngine, app: App, stream: bool) -> None:
    answer = app.chat(messages=user(image()), return_token_ids=True, stream=stream, max_tokens=2)
    first = events_of(answer)[0] if stream else answer.json()
    assert first["prompt_token_ids"] == engine.seen[0][2]
    assert "lora" not in first


def test_text_alone_on_a_multimodal_model_is_parts_too(engine: FakeEngine, app: App) -> None:
    app.chat(messages=user(text("a"), text("b")))
    app.chat()
    assert [prompt_of(engine, request) for request in (0, 1)] == [
        "[user]a\nb[assistant]",
        "[user]hey[assistant]",
    ]
    assert engine.seen_media == [(), ()]


def test_a_url_of_an_allowed_host(internet: Internet) -> None:
    internet.add("cdn.test", ok(random_png(5)))
    media = MediaConfig(allowed_media_domains=["cdn.test"])
    engine = FakeEngine(modalities=ALL, media=media)
    part = {"type": "image_url", "image_url": {"url": "http://cdn.test/a.png", "detail": "auto"}}
    assert App(engine).chat(messages=user(part)).status_code == 200
    [[item]] = engine.seen_media
    assert item.inputs["decoded"].pixels.tobytes() == random_image(5).tobytes()


# --- what is refused ---------------------------------------------------------------------------

BOMB = data_url(png_by_hand(60_000, 60_000, b""))
REFUSED: list[tuple[Part, str, str]] = [
    ({"type": "image_url", "image_url": {"url": BOMB}}, "image_url", "too many pixels"),
    ({"type": "image_url", "image_url": {"url": data_url(b"junk")}}, "image_url", "no format"),
    (
        {"type": "image_url", "image_url": {"url": data_url(random_png(1, 99, 99)[:900])}},
        "image_url",
        "truncated",
    ),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "image_url", "64"),
    ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}, "image_url", "not allowed"),
    ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "image_url", "not allowed"),
    ({"type": "image_url", "image_url": {"url": "gopher://x"}}, "image_url", "gopher"),
    ({"type": "image_url", "image_url": {"url": "a\x01"}}, "image_url", "surrogates"),
    ({"type": "image_url", "image_url": {"url": 5}}, "image_url.url", "URL"),
    ({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}, "image_url.detail", "low"),
    ({"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}}, "input_audio", "so"),
    ({"type": "input_audio", "input_audio": {"data": "AA"}}, "input_audio.format", "format"),
    ({"type": "audio_url", "audio_url": {"url": data_url(b"xy", "image/png")}}, "audio_url", "au"),
    ({"type": "video_url", "video_url": {"url": "https://a.test/a.mp4"}}, "video_url", "frames"),
    ({"type": "image_embeds", "image_embeds": "AAAA"}, "type", "image_embeds"),
]


@pytest.mark.parametrize(("part", "where", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_media(engine: FakeEngine, app: App, part: Part, where: str, said: str) -> None:
    messages = [{"role": "system", "content": "x"}, *user(image(), text("t"), part)]
    for stream in (False, True):
        response = app.chat(messages=messages, stream=stream)
        check_refused(engine, response, f"messages.1.content.2.{where}", said)
    assert app.chat(messages=user(image())).status_code == 200, "the others are unharmed"


def test_a_host_that_is_not_public(internet: Internet) -> None:
    internet.names["inner.test"] = ["10.0.0.7"]
    engine = FakeEngine(modalities=ALL, media=MediaConfig(allowed_media_domains=["*"]))
    part = {"type": "image_url", "image_url": "http://inner.test/secret"}
    response = App(engine).chat(messages=user(part))
    assert response.status_code == 403
    check_refused(engine, response, "messages.0.content.0.image_url", "public address")
    assert "10.0.0.7" not in response.text


@pytest.mark.parametrize("role", ["assistant", "narrator"])
def test_roles(engine: FakeEngine, app: App, role: str) -> None:
    messages = [{"role": role, "content": [text("x"), image()]}]
    where = "messages.0.content.1.image_url"
    check_refused(engine, app.chat(messages=messages), where, f"{role} message")
    messages = [{"role": "system", "content": [text("x"), image()]}]
    assert app.chat(messages=messages).status_code == 200


def test_a_modality_that_the_model_does_not_take() -> None:
    engine = FakeEngine(modalities=["image"])
    response = App(engine).chat(messages=user(image(), sound(), video()))
    check_refused(engine, response, "messages.0.content.1.input_audio", "takes image")


@pytest.mark.parametrize("part", [image(), sound(), sound_url(), video()])
def test_a_text_model_takes_none(part: Part) -> None:
    engine = FakeEngine()
    response = App(engine).chat(messages=user(text("x"), part))
    where = f"messages.0.content.1.{part['type']}"
    check_refused(engine, response, where, "this is a text model")
    assert App(engine).chat(messages=user(text("x"))).status_code == 200


def test_too_many_items_are_refused_before_one_is_loaded(
    engine: FakeEngine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MediaLoader, "part", lambda *_: pytest.fail("it was loaded"))
    messages = [*user(*(image(seed) for seed in range(8))), *user(image(9), video(), video())]
    response = app.chat(messages=messages)
    check_refused(engine, response, "messages", "9 of image where 8 are allowed")
    assert "2 of video where 1" in response.text


def test_an_unknown_model_is_refused_before_anything_is_loaded(
    engine: FakeEngine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MediaLoader, "part", lambda *_: pytest.fail("it was loaded"))
    check_refused(engine, app.chat(model="no", messages=user(image())), "model", "'no'")
    check_refused(engine, app.chat(n=0, messages=user(image())), "n", "n must be")


def test_a_prompt_whose_placeholders_fill_the_context() -> None:
    engine = FakeEngine(modalities=ALL, context=20)
    check_refused(engine, App(engine).chat(messages=user(image())), "messages", "context is 20")


def test_a_body_may_hold_an_item_of_the_largest_size() -> None:
    def status(engine: FakeEngine, num_bytes: int, **settings: Any) -> tuple[int, str]:
        content = b'{"x":"' + b"a" * (num_bytes - 8) + b'"}'
        headers = {"content-type": "application/json"}
        app = App(engine, **settings)
        answer = app.request("POST", "/v1/chat/completions", content=content, headers=headers)
        return answer.status_code, answer.text

    media = MediaConfig(max_media_bytes=3 << 20)
    multimodal = FakeEngine(modalities=ALL, media=media)
    assert status(FakeEngine(media=media), 16 << 20)[0] == 400, "the field x is unknown"
    assert status(FakeEngine(media=media), (16 << 20) + 1)[0] == 413
    assert status(multimodal, 20 << 20)[0] == 400
    code, said = status(multimodal, (20 << 20) + 1)
    assert code == 413 and "--max-body-bytes" in said
    assert status(multimodal, 5000, max_body_bytes=4000)[0] == 413


# --- beside others -----------------------------------------------------------------------------


def test_a_slow_host_holds_up_nobody_else(internet: Internet) -> None:
    release = threading.Event()
    internet.add("slow.test", lambda connection: release.wait(20))
    media = MediaConfig(allowed_media_domains=["slow.test"], fetch_timeout_s=20)
    engine = FakeEngine(modalities=ALL, media=media)
    app = App(engine)
    slow = user(*({"type": "image_url", "image_url": "http://slow.test/"} for _ in range(8)))

    async def ask() -> None:
        async with app.client() as client:

            async def post(messages: Any) -> httpx.Response:
                body = {"model": "org/base", "messages": messages}
                return await client.post("/v1/chat/completions", json=body)

            waiting = [asyncio.create_task(post(slow)) for _ in range(20)]
            await asyncio.sleep(0.3)
            quick = await asyncio.wait_for(post(user(image())), timeout=10)
            assert quick.status_code == 200 and not any(task.done() for task in waiting)
            release.set()
            for answer in await asyncio.gather(*waiting):
                assert answer.json()["error"]["code"] == "media_unavailable"

    asyncio.run(ask())
    assert len(engine.seen) == 1


def test_a_request_loads_few_items_at_a_time_and_few_requests_hold_media(
    engine: FakeEngine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_loading, "MAX_THREADS_A_REQUEST", 2)
    original, lock = MediaLoader.part, threading.Lock()
    now = {"running": 0, "most": 0}

    def counted(loader: MediaLoader, part: Any) -> Any:
        with lock:
            now["running"] += 1
            now["most"] = max(now["most"], now["running"])
        time.sleep(0.02)
        try:
            return original(loader, part)
        finally:
            with lock:
                now["running"] -= 1

    monkeypatch.setattr(MediaLoader, "part", counted)
    assert app.chat(messages=user(*(image(seed) for seed in range(8)))).status_code == 200
    assert now["most"] == 2

    # One request at a time, whatever else there is to do.
    lane = media_loading.Lane(requests=asyncio.Semaphore(1))
    app.asgi.state.loramux.media.inline = lane

    async def three() -> list[httpx.Response]:
        async with app.client() as client:
            body = {"model": "org/base", "messages": user(*(image(seed) for seed in range(6)))}
            posts = [client.post("/v1/chat/completions", json=body) for _ in range(3)]
            return list(await asyncio.gather(*posts))

    assert [answer.status_code for answer in asyncio.run(three())] == [200] * 3
    assert now["most"] == 2


def test_one_bad_item_ends_the_loading_of_the_others(
    engine: FakeEngine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_loading, "MAX_THREADS_A_REQUEST", 1)
    original, loaded = MediaLoader.part, []
    monkeypatch.setattr(
        MediaLoader, "part", lambda loader, part: loaded.append(part) or original(loader, part)
    )
    bad = {"type": "image_url", "image_url": "data:,x"}
    response = app.chat(messages=user(bad, *(image(seed) for seed in range(7))))
    check_refused(engine, response, "messages.0.content.0.image_url", "no format")
    assert len(loaded) <= 2


def test_a_client_that_leaves_while_media_load(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, release = threading.Event(), threading.Event()

    def stall(*_: Any) -> None:
        arrived.set()
        release.wait(20)

    monkeypatch.setattr(MediaLoader, "part", stall)
    body = {"model": "org/base", "messages": user(image())}
    with LiveServer(engine, shutdown_timeout_s=0) as live:
        slots = live.app.state.loramux.media.inline.requests
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=0.5)
        assert arrived.wait(5)
        wait_until(lambda: slots._value == media_loading.MAX_REQUESTS)
        release.set()
    assert engine.seen == []


# --- adapters by modality ----------------------------------------------------------------------

PATHS = {"image": "/adapters/i", "audio": "/adapters/a"}


def used(response: httpx.Response, stream: bool = False) -> tuple[str, Any]:
    """The header, and what the body says."""
    assert response.status_code == 200, response.text
    if not stream:
        return response.headers.get("x-loramux-adapters", ""), response.json().get("lora")
    first, *rest = events_of(response)
    assert not any("lora" in event for event in rest)
    return response.headers.get("x-loramux-adapters", ""), first.get("lora")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parts", "modalities"),
    [
        ([text("x")], []),
        ([image()], ["image"]),
        ([image(), image(2)], ["image"]),
        ([sound()], ["audio"]),
        ([sound_url()], ["audio"]),
        ([video()], []),
        ([video(), sound()], ["audio"]),
        ([image(), sound()], ["audio", "image"]),
    ],
)
def test_defaults_apply_and_the_answer_says_so(
    parts: list[Part], modalities: list[str], stream: bool
) -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS)
    response = App(engine).chat(messages=user(*parts), stream=stream)
    header, body = used(response, stream)
    digests = {name: engine.served[f"~{name}"].digest for name in modalities}
    assert header == ",".join(f"~{name}@{digest[:12]}" for name, digest in digests.items())
    assert (body or []) == [
        {"name": f"~{name}", "modality": name, "digest": digest} for name, digest in digests.items()
    ]
    [(_, uses, _)] = engine.seen
    assert [(use.name, use.scale) for use in uses] == [(f"~{name}", 1.0) for name in modalities]


@pytest.mark.parametrize(
    ("body", "names"),
    [({"model": "alpha"}, ["alpha"]), ({"lora": ["beta"]}, ["beta"]), ({"lora": []}, [])],
    ids=str,
)
@pytest.mark.parametrize("policy", ["compose", "refuse", "none"])
def test_an_explicit_adapter_wins(body: dict[str, Any], names: list[str], policy: str) -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS, default_mm_loras_policy=policy)
    header, said = used(App(engine).chat(messages=user(image(), sound()), **body))
    assert [use.name for use in engine.seen[0][1]] == names
    assert said is None and "~" not in header


def test_policies_for_several_modalities() -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS, default_mm_loras_policy="refuse")
    response = App(engine).chat(messages=user(image(), sound()))
    assert response.status_code == 400
    check_refused(engine, response, "lora", "audio and image")
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS, default_mm_loras_policy="none")
    assert used(App(engine).chat(messages=user(image(), sound()))) == ("", None)
    assert used(App(engine).chat(messages=user(image())))[0].startswith("~image@")


def test_completions_have_no_media_and_no_defaults() -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS)
    response = App(engine).complete()
    assert response.status_code == 200 and "x-loramux-adapters" not in response.headers


def test_nobody_can_name_a_default_adapter() -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS)
    app = App(engine, allow_runtime_lora_updating=True, lora_root="/")
    assert [card["id"] for card in app.get("/v1/models").json()["data"]] == [
        "org/base",
        "alpha",
        "beta",
    ]
    assert app.get("/v1/models/~image").status_code == 404
    for body in ({"model": "~image"}, {"lora": ["~image"]}):
        for response in (app.complete(**body), app.chat(**body, messages=user(image()))):
            assert response.status_code == 404, body
    load = {"lora_name": "~image", "lora_path": "/adapters", "load_inplace": True}
    assert app.post("/v1/load_lora_adapter", load).status_code == 400
    assert app.post("/v1/unload_lora_adapter", {"lora_name": "~image"}).status_code == 400
    assert set(engine.served) == {"alpha", "beta", "~image", "~audio"} and engine.seen == []
    # A user's adapter may be called like the modality.
    engine.served["image"] = reference("image")
    assert app.chat(model="image", messages=user(image())).status_code == 200
    assert [use.name for use in engine.seen[0][1]] == ["image"]


def test_metrics_count_default_adapters_under_their_names() -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras=PATHS)
    app = App(engine)
    app.chat(messages=user(image(), sound()))
    text_of_metrics = app.get("/metrics").text
    line = 'loramux_requests_total{adapter="~audio+~image",finish_reason="stop"} 1.0'
    assert line in text_of_metrics


def test_a_default_adapter_that_cannot_be_read_refuses_the_start() -> None:
    engine = FakeEngine(modalities=ALL, default_mm_loras={"image": "/no/such/folder"})
    engine.served.clear()
    listener = run.bind("127.0.0.1", 0)
    from loramux.config import ServerConfig

    with listener, pytest.raises(AdapterNotFound, match="/no/such/folder"):
        run.serve_engine(engine, ServerConfig(), [], listener)  # type: ignore[arg-type]
    assert engine.started and engine.stopping
