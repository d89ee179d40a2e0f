"""Limits of adapters: what is refused, when to come back, and that nothing stays taken."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
from fake_engine import BASE, FakeEngine
from serving import App, LiveServer, wait_until

from loramux.config import EngineConfig
from loramux.errors import EngineStopped, InvalidField, QuotaReached
from loramux.server.quotas import Grant, Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def quotas(clock: Clock | None = None, **limits: dict[str, Any]) -> Quotas:
    return Quotas(EngineConfig(model=BASE, adapter_limits=limits), clock or Clock())


def refusal(quotas: Quotas, names: list[str], answers: int = 1, tokens: int = 0) -> QuotaReached:
    with pytest.raises(QuotaReached) as caught:
        quotas.admit(names, answers, tokens)
    return caught.value


def test_concurrency_counts_answers_and_comes_back_with_each() -> None:
    quota = quotas(a={"max_concurrency": 3})
    grant = quota.admit(["a"], 2, 0)
    assert refusal(quota, ["a"], 2).limit == "max_concurrency"
    other = quota.admit(["a"], 1, 0)
    grant.saw(0, 5, finished=True)
    quota.admit(["a"], 1, 0).close()
    for _ in range(2):
        grant.close()
        other.close()
    quota.admit(["a"], 3, 0)
    with pytest.raises(InvalidField, match="4 answers are more than max_concurrency"):
        quota.admit(["a"], 4, 0)


def test_requests_are_admitted_again_at_the_moment_that_was_said() -> None:
    clock = Clock()
    quota = quotas(clock, a={"requests_per_minute": 6})
    for _ in range(6):
        quota.admit(["a"], 1, 0)
    error = refusal(quota, ["a"])
    assert error.retry_after_s == pytest.approx(10)
    assert "adapter 'a' has reached requests_per_minute (6)" in str(error)
    clock.now += error.retry_after_s - 0.01
    refusal(quota, ["a"])
    clock.now += 0.02
    quota.admit(["a"], 1, 0)
    clock.now += 1e6
    quota.admit(["a"], 6, 0)  # and no more than a minute's worth is saved up
    refusal(quota, ["a"])


def test_tokens_of_answers_are_charged_as_they_come_and_large_prompts_are_not_shut_out() -> None:
    clock = Clock()
    quota = quotas(clock, a={"tokens_per_minute": 600})
    grant = quota.admit(["a"], 1, 500)
    grant.saw(0, 90, finished=False)
    assert refusal(quota, ["a"], 1, 20).retry_after_s == pytest.approx(1)
    quota.admit(["a"], 1, 10)
    clock.now += 60
    quota.admit(["a"], 1, 3000)  # more than a minute has: once the bucket is full
    assert refusal(quota, ["a"], 1, 1).retry_after_s == pytest.approx(240.1)


def test_of_a_sum_each_adapter_is_charged_and_the_tightest_counts() -> None:
    quota = quotas(a={"max_concurrency": 1}, b={"max_concurrency": 2})
    grant = quota.admit(["a", "b", "c"], 1, 0)
    assert refusal(quota, ["b", "a"]).adapter == "a"
    quota.admit(["b"], 1, 0)
    assert refusal(quota, ["b"]).adapter == "b"
    grant.close()
    quota.admit(["b"], 1, 0)
    quota.admit(["a"], 1, 0)


def test_waiting_ends_with_the_first_token() -> None:
    quota = quotas(a={"max_waiting": 2})
    grant = quota.admit(["a"], 2, 0)
    assert refusal(quota, ["a"]).limit == "max_waiting"
    with pytest.raises(QuotaReached):
        quota.check(["a"])
    grant.saw(1, 1, finished=False)
    quota.admit(["a"], 1, 0)
    quota.admit(["other"], 50, 10**6)


def test_the_base_model_is_one_of_them() -> None:
    quota = quotas(**{BASE: {"max_concurrency": 1}})
    quota.admit([], 1, 0)
    assert "the base model has reached max_concurrency (1)" in str(refusal(quota, []))


def test_books_balance_whatever_the_order(seed: int = 3) -> None:
    dice = random.Random(seed)
    quota = quotas(a={"max_concurrency": 5}, b={"max_concurrency": 3, "max_waiting": 2})
    grants: list[tuple[Grant, int]] = []
    for _ in range(2000):
        names = dice.sample(["a", "b"], dice.randint(1, 2))
        try:
            answers = dice.randint(1, 3)
            grants.append((quota.admit(names, answers, 0), answers))
        except QuotaReached:
            pass
        for grant, answers in grants:
            if dice.random() < 0.5:
                finished = dice.random() < 0.3
                grant.saw(dice.randrange(answers), dice.randint(0, 2), finished=finished)
        if grants and dice.random() < 0.4:
            grants.pop(dice.randrange(len(grants)))[0].close()
    for grant, _ in grants:
        grant.close()
    assert all(q.open == q.waiting == 0 for q in quota._quotas.values())


# --- over HTTP --------------------------------------------------------------------------------


def limited(**limits: Any) -> App:
    return App(FakeEngine(adapter_limits=limits))


def test_a_refusal_says_which_limit_and_when_to_come_back() -> None:
    app = limited(alpha={"requests_per_minute": 2})
    assert [app.complete(model="alpha").status_code for _ in range(3)] == [200, 200, 429]
    for answer in (app.complete(model="alpha", stream=True), app.chat(model="alpha")):
        error = answer.json()["error"]
        assert answer.status_code == 429
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "requests_per_minute (2)" in error["message"]
        assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert app.complete().status_code == app.complete(model="beta").status_code == 200
    assert app.complete(lora=["beta", "alpha"]).status_code == 429
    text = app.get("/metrics").text
    assert 'loramux_requests_refused_total{adapter="alpha",limit="requests_per_minute"} 4.0' in text


def test_a_request_of_several_prompts_is_admitted_whole_or_not_at_all() -> None:
    app = limited(alpha={"max_concurrency": 5})
    assert app.complete(model="alpha", prompt=["a", "b"], n=2).status_code == 200
    answer = app.complete(model="alpha", prompt=["a", "b"], n=3)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
    assert app.complete(model="alpha", prompt=["a", "b"], n=2).status_code == 200
    assert len(app.engine.request_ids) == 4, "what is refused never reaches the engine"


def test_what_fails_gives_back_what_it_had() -> None:
    app = limited(**{"*": {"max_concurrency": 1, "max_waiting": 1}})
    app.engine.refuse_with = EngineStopped("on purpose")
    assert [app.complete().status_code for _ in range(3)] == [503] * 3
    app.engine.refuse_with, app.engine.fail_at = None, 2
    assert [app.complete().status_code for _ in range(3)] == [503] * 3
    assert [app.complete(stream=True).status_code for _ in range(3)] == [200] * 3
    app.engine.fail_at = None
    embedding = {"model": "alpha", "input": ["a"]}
    assert [app.post("/v1/embeddings", embedding).status_code for _ in range(3)] == [200] * 3
    assert app.complete(prompt="").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_place_back(stream: bool) -> None:
    engine = FakeEngine(adapter_limits={"alpha": {"max_concurrency": 1}})
    engine.delay_s = 0.5
    with LiveServer(engine, shutdown_timeout_s=0) as server:
        body = {"model": "alpha", "prompt": "x" * 50, "stream": stream}

        async def leave() -> int:
            async with httpx.AsyncClient(base_url=server.url) as client:
                task = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(wait_until, lambda: engine.running == 1)
                refused = await client.post("/v1/completions", json=body)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return refused.status_code

        assert asyncio.run(leave()) == 429
        wait_until(lambda: engine.running == 0)
        engine.delay_s = 0.0
        wait_until(lambda: httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200)


def test_limits_in_force_and_what_is_in_flight_can_be_seen() -> None:
    app = limited(**{"al*": {"weight": 2.5, "max_waiting": 7}})
    shown = {item["name"]: item["limits"] for item in app.get("/v1/adapters").json()["data"]}
    assert (shown["alpha"]["weight"], shown["alpha"]["max_waiting"]) == (2.5, 7)
    assert shown["beta"] == {
        "weight": 1.0,
        "max_concurrency": None,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "max_waiting": None,
    }
    lines = app.get("/metrics").text.splitlines()
    for line in (
        'loramux_adapter_answers_running{adapter="alpha"} 2.0',
        'loramux_adapter_answers_waiting{adapter="alpha"} 3.0',
        'loramux_adapter_computed_tokens_total{adapter="alpha"} 400.0',
    ):
        assert line in lines
    assert not any("gone" in line for line in lines)
