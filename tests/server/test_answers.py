"""What the two generation endpoints answer, whole and streamed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import App, events_of


def text_by_choice(events: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for event in events:
        for choice in event["choices"]:
            delta = choice.get("delta")
            texts[choice["index"]] += choice["text"] if delta is None else delta.get("content", "")
    return dict(texts)


def test_a_completion(app: App) -> None:
    body = app.complete(max_tokens=50).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "org/base"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "<base> 0 yeh",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_defaults(engine: FakeEngine, app: App) -> None:
    app.complete()
    app.chat()
    completion, chat = (params for params, _, _ in engine.seen)
    assert (completion.max_tokens, chat.max_tokens) == (16, None)
    assert completion.temperature == chat.temperature == 1.0


def test_sampling_fields_reach_the_engine(engine: FakeEngine, app: App) -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "min_tokens": 1,
        "max_tokens": 3,
    }
    body = fields | {"stop": "END", "logit_bias": {"5": -1.5}}
    assert app.complete(**body).status_code == 200
    assert app.chat(**body).status_code == 200
    for params, _, _ in engine.seen:
        for name, value in fields.items():
            wanted = tuple(value) if isinstance(value, list) else value
            assert getattr(params, name) == wanted
        assert params.stop == ("END",)
        assert params.logit_bias == ((5, -1.5),)


def test_prompts_and_answers_are_listed_in_order(engine: FakeEngine, app: App) -> None:
    engine.delay_s = 0.001
    body = {"prompt": ["abc", "x", "hello"], "n": 2, "max_tokens": 60}
    whole = app.complete(**body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3, 4, 5]
    texts = [choice["text"] for choice in whole["choices"]]
    assert texts == [f"<base> {i} {p}" for p in ("cba", "x", "olleh") for i in (0, 1)]
    assert whole["usage"]["prompt_tokens"] == 4 + 2 + 6
    streamed = text_by_choice(events_of(app.complete(**body, stream=True)))
    assert [streamed[index] for index in range(6)] == texts


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105], [106]]])
def test_prompts_as_token_ids(engine: FakeEngine, app: App, prompt: Any) -> None:
    assert app.complete(prompt=prompt).status_code == 200
    sent = [ids for _, _, ids in engine.seen]
    assert sent == (prompt if isinstance(prompt[0], list) else [prompt])


def test_special_tokens_can_be_left_out(engine: FakeEngine, app: App) -> None:
    app.complete(add_special_tokens=False)
    assert engine.seen[0][2] == [ord(c) for c in "hey"]


def test_echo_puts_the_prompt_first(app: App) -> None:
    assert app.complete(echo=True, max_tokens=6).json()["choices"][0]["text"] == "hey<base>"
    events = events_of(app.complete(echo=True, max_tokens=6, stream=True, n=2))
    assert text_by_choice(events) == {0: "hey<base>", 1: "hey<base>"}


def test_stop_and_length(app: App) -> None:
    stopped = app.complete(stop=["> "]).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "> ")
    cut = app.complete(max_tokens=2).json()["choices"][0]
    assert (cut["finish_reason"], cut["text"]) == ("length", "<b")


def test_completion_logprobs(app: App) -> None:
    whole = app.complete(logprobs=2, max_tokens=3).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["<", "b", "a"]
    assert whole["token_logprobs"] == [-0.5] * 3
    assert whole["text_offset"] == [0, 1, 2]
    # JSON has no infinity.
    assert whole["top_logprobs"][0] == {"z": -9999.0, "y": -1.5, "<": -0.5}
    offsets = [
        offset
        for event in events_of(app.complete(logprobs=0, max_tokens=3, stream=True))
        for offset in event["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 1, 2]


def test_chat_logprobs(app: App) -> None:
    body = app.chat(logprobs=True, top_logprobs=1, max_tokens=2).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["<", "b"]
    assert content[0]["bytes"] == [60]
    assert content[0]["top_logprobs"] == [{"token": "z", "logprob": -9999.0, "bytes": [122]}]
    alone = app.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert alone[0]["top_logprobs"] == []


def test_a_chat_answer(app: App) -> None:
    body = app.chat().json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<base> 0 ]tnatsissa[yeh]resu["}
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_chat_stream(app: App) -> None:
    events = events_of(app.chat(stream=True, n=2, max_tokens=5))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    for index in (0, 1):
        deltas = [
            (choice["delta"], choice["finish_reason"])
            for event in events
            for choice in event["choices"]
            if choice["index"] == index
        ]
        assert deltas[0] == ({"role": "assistant", "content": ""}, None)
        assert [reason for _, reason in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1][1] == "length"
    assert text_by_choice(events) == {0: "<base", 1: "<base"}
    assert not any("usage" in event for event in events)


@pytest.mark.parametrize("endpoint", ["complete", "chat"])
def test_usage_in_streams(app: App, endpoint: str) -> None:
    ask = getattr(app, endpoint)
    events = events_of(ask(stream=True, max_tokens=4, stream_options={"include_usage": True}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert events[-1]["usage"] == ask(max_tokens=4).json()["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(ask(stream=True, max_tokens=4, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 4


def test_token_ids_on_request(app: App) -> None:
    choice = app.complete(return_token_ids=True, max_tokens=2).json()["choices"][0]
    assert choice["token_ids"] == [ord("<"), ord("b")]
    assert choice["prompt_token_ids"] == [1, *map(ord, "hey")]
    chat = app.chat(return_token_ids=True, max_tokens=2).json()
    assert chat["prompt_token_ids"][0] == 1
    assert chat["choices"][0]["token_ids"] == [ord("<"), ord("b")]
    for events in (
        events_of(app.complete(return_token_ids=True, max_tokens=2, stream=True)),
        events_of(app.chat(return_token_ids=True, max_tokens=2, stream=True)),
    ):
        ids = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert ids == [ord("<"), ord("b")]
        holders = [e for e in events if "prompt_token_ids" in (e | e["choices"][0])]
        assert holders == events[:1]


def test_a_client_may_name_its_request_and_repeat_the_name(app: App) -> None:
    for _ in range(2):
        assert app.complete(request_id="mine").json()["id"] == "cmpl-mine"


def test_text_parts_are_joined(engine: FakeEngine, app: App) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    app.chat(messages=[{"role": "user", "content": parts}])
    assert "".join(map(chr, engine.seen[0][2][1:])) == "[user]a\nb[assistant]"


def test_template_options(engine: FakeEngine, app: App) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    app.chat(messages=turns, continue_final_message=True)
    app.chat(messages=turns, add_generation_prompt=False, chat_template_kwargs={"k": 1})
    first, second = ("".join(map(chr, ids[1:])) for _, _, ids in engine.seen)
    assert first == "[user]q[assistant]a"
    assert second == "[user]q[assistant]a{'k': 1}"


def test_max_completion_tokens_wins(engine: FakeEngine, app: App) -> None:
    app.chat(max_tokens=9, max_completion_tokens=4)
    assert engine.seen[0][0].max_tokens == 4


@pytest.mark.parametrize(
    ("body", "uses"),
    [
        ({"model": "alpha"}, [("alpha", 1.0)]),
        ({"lora": []}, []),
        ({"lora": ["beta"]}, [("beta", 1.0)]),
        ({"lora": [{"name": "alpha", "scale": -0.5}, "beta"]}, [("alpha", -0.5), ("beta", 1.0)]),
    ],
    ids=str,
)
def test_adapters(
    engine: FakeEngine, app: App, body: dict[str, Any], uses: list[tuple[str, float]]
) -> None:
    for response in (app.complete(**body), app.chat(**body), app.chat(**body, stream=True)):
        assert response.status_code == 200
        used = ",".join(f"{name}@{engine.served[name].digest[:12]}" for name, _ in uses)
        assert response.headers.get("x-loramux-adapters", "") == used
    for _, adapters, _ in engine.seen:
        assert [(use.name, use.scale) for use in adapters] == uses


def test_an_adapter_that_the_prompt_does_not_invoke_is_named(engine: FakeEngine, app: App) -> None:
    for name in ("alpha", "beta"):
        engine.served[name] = replace(engine.served[name], invocation=tuple(map(ord, name)))
    digest = engine.served["alpha"].digest
    told = [{"name": "alpha", "digest": digest}]
    body = {"model": "alpha"}
    idle = [app.complete(**body), app.chat(**body)]
    assert [response.json()["not_invoked"] for response in idle] == [told, told]
    idle += [app.complete(**body, stream=True), app.chat(**body, stream=True)]
    assert events_of(idle[-1])[0]["not_invoked"] == told
    idle.append(app.post("/v1/embeddings", {**body, "input": "hey"}))
    idle.append(app.complete(**body, prompt=["say alpha", "hey"]))
    both = {"lora": ["alpha", "beta"]}
    idle.append(app.complete(**both, prompt=["say beta", "beta, then"]))
    for response in idle:
        assert response.headers["x-loramux-not-invoked"] == f"alpha@{digest[:12]}"
    invoked = [app.complete(**both, prompt=["alphabeta"]), app.complete(**body, prompt="alpha")]
    invoked += [app.complete(), app.chat(**body, messages=[{"role": "alpha", "content": ""}])]
    for response in invoked:
        assert response.status_code == 200 and "not_invoked" not in response.json()
        assert "x-loramux-not-invoked" not in response.headers


@pytest.mark.parametrize(
    ("body", "param"), [({"model": "gamma"}, "model"), ({"lora": ["alpha", "gamma"]}, "lora")]
)
def test_unknown_names(app: App, body: dict[str, Any], param: str) -> None:
    for response in (app.complete(**body), app.chat(**body, stream=True)):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", param)
        assert "gamma" in error["message"]


def test_without_lora_the_remedy_names_the_flag() -> None:
    app = App(FakeEngine(adapters=(), lora=False))
    assert "--enable-lora" in app.complete(model="alpha").json()["error"]["message"]
