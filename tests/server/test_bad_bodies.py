"""A bad field is a 400 that names it; nothing of the request reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import App

USER = {"role": "user", "content": "hey"}

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"no_such_field": 1}, "no_such_field"),
    ({"model": 3}, "model"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1 << 64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    ({"lora": "alpha"}, "lora"),
    ({"lora": [{"scale": 1}]}, "lora.0.name"),
    ({"lora": [{"name": "alpha", "weight": 1}]}, "lora.0.weight"),
    ({"lora": [{"name": "alpha", "scale": "much"}]}, "lora.0.scale"),
    ({"lora": [""]}, "lora.0.name"),
    ({"model": "alpha", "lora": ["beta"]}, "lora"),
    ({"model": "alpha", "lora": []}, "lora"),
]

COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ""} | {"add_special_tokens": False}, "prompt"),
    ({"prompt": "x" * 500}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"prompt": [5, 6], "echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"messages": [USER]}, "messages"),
]

CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [USER | {"mood": "sad"}]}, "messages.0.mood"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "unknown-role", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"logprobs": 3.5}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
]


def _check(engine: FakeEngine, response: Any, field: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    leaf = field.replace(".[key]", "").split(".")[-1]
    assert error["param"] is not None and error["param"].startswith(field), error
    assert leaf in error["message"] or leaf.isdigit(), error
    assert engine.seen == []


@pytest.mark.parametrize(("body", "field"), BOTH + COMPLETIONS, ids=str)
def test_completions(engine: FakeEngine, app: App, body: dict[str, Any], field: str) -> None:
    _check(engine, app.complete(**body), field)


@pytest.mark.parametrize(("body", "field"), BOTH + CHAT, ids=str)
def test_chat(engine: FakeEngine, app: App, body: dict[str, Any], field: str) -> None:
    _check(engine, app.chat(**body), field)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_required_fields(app: App, missing: str) -> None:
    body = {"model": "org/base", "prompt": "x"}
    del body[missing]
    response = app.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == missing


def test_every_refused_field_is_named_at_once(app: App) -> None:
    message = app.chat(tools=[{}], response_format={"type": "json_schema"}).json()["error"]
    assert "tools" in message["message"] and "response_format" in message["message"]


def test_a_limit_is_told_with_its_number(app: App) -> None:
    message = app.complete(prompt=[5, 6], max_tokens=199).json()["error"]["message"]
    assert "198" in message and "200" in message
    assert app.complete(prompt=[5, 6], max_tokens=198).status_code == 200


def test_infinite_scales_are_refused(app: App) -> None:
    content = b'{"model": "org/base", "prompt": "x", "lora": [{"name": "alpha", "scale": NaN}]}'
    headers = {"content-type": "application/json"}
    response = app.request("POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora.0.scale"


HARMLESS: list[dict[str, Any]] = [
    {"user": "me"},
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}, "modalities": ["text"]},
    {"temperature": None, "n": None, "max_tokens": None, "stop": None, "lora": None},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}]},
]


@pytest.mark.parametrize("body", HARMLESS, ids=str)
def test_fields_without_effect_are_accepted(app: App, body: dict[str, Any]) -> None:
    assert app.chat(**body).status_code == 200
