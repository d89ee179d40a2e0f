"""Requests that name an adapter nobody has loaded: found, refused, or unknown, and nobody else waits."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from huggingface_hub import constants
from serving import App

from adapter_hub import AdapterHub
from loramux.config import EngineConfig, LoRAConfig, ServerConfig
from loramux.engine.service import AsyncEngine
from loramux.errors import UnknownModel
from loramux.llm import LLM
from loramux.offline_arguments import LoRARequest
from loramux.server.app import create_app
from loramux.types import SamplingParams
from tiny import TinyWorld


class LookingUp(FakeEngine):
    """Finds every name that begins with "new"."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(adapter_roots=["memory://x"], **settings)
        self.asked: list[str] = []

    async def resolve_adapter(self, name: str) -> None:
        self.asked.append(name)
        if not name.startswith("new"):
            raise UnknownModel(f"there is no adapter {name!r}", field="model")
        self.served[name] = next(iter(self.served.values())).__class__(
            name=name, digest="d" * 64, source="memory://x", max_r=1, num_bytes=1
        )


def test_only_names_that_are_not_served_are_looked_up() -> None:
    engine = LookingUp()
    app = App(engine)
    assert app.complete(model="alpha").status_code == 200
    assert app.complete(lora=["alpha", "beta"]).status_code == 200
    assert app.complete().status_code == 200
    assert engine.asked == []
    answer = app.complete(model="new1")
    assert answer.status_code == 200 and answer.headers["x-loramux-adapters"].startswith("new1@")
    assert app.chat(lora=["alpha", "new2", {"name": "new2", "scale": 2}]).status_code == 200
    assert engine.asked == ["new1", "new2"]
    answer = app.complete(model="old")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert app.complete(model="new3", lora=["alpha"]).status_code == 404
    assert engine.asked == ["new1", "new2", "old"], "a request that is wrong anyway loads nothing"
    for path in ("/v1/embeddings", "/classify"):
        body = {"model": "new" + path[-3:], "input": "x"}
        assert app.post(path, body).status_code == 200


def test_defaults_of_modalities_cannot_be_named() -> None:
    engine = LookingUp(modalities={"image"}, default_mm_loras={"image": "/somewhere"}, max_loras=4)
    assert App(engine).complete(model="~image").status_code == 404
    assert App(engine).complete(lora=["~image"]).status_code == 404


# --- the real engine ---------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AdapterHub]:
    hub = AdapterHub()
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.close()


@pytest.fixture
def root(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in "ab":
        shutil.copytree(tiny_world.adapters[name], root / "team" / name)
    shutil.copytree(tiny_world.adapters["c"], root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"xx")
    return root


def config_of(world: TinyWorld, root: Path, **settings: Any) -> EngineConfig:
    lora = LoRAConfig(
        **{"max_loras": 2, "max_lora_rank": 8, "adapter_roots": [str(root)], **settings}
    )
    return EngineConfig(model=str(world.model), device="cpu", served_model_name=["base"], lora=lora)


def test_adapters_are_loaded_on_first_use(
    tiny_world: TinyWorld, root: Path, hub: AdapterHub
) -> None:
    hub.repositories["org/d"] = {"main": tiny_world.adapters["d"]}
    config = config_of(tiny_world, root, adapter_repositories=["org/*"], verify_adapters=True)
    engine = AsyncEngine.create(config)
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}

    async def live() -> dict[str, Any]:
        app = create_app(engine, ServerConfig(), owns_engine=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        await engine.start()
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

                async def ask(**body: Any) -> httpx.Response:
                    body = {"prompt": "hello", "return_token_ids": True, **params, **body}
                    return await client.post("/v1/completions", json=body, timeout=60)

                names = ["team/a"] * 8 + ["team/b"] * 3 + ["org/d"] * 4 + ["base"]
                many = await asyncio.gather(*(ask(model=name) for name in names))
                sums = await ask(model="base", lora=["team/a", "org/d"])
                bad = [await ask(model="broken") for _ in range(2)]
                absent = [
                    await ask(model=name) for name in ("../team/a", "org/none", "team", "other/x")
                ]
                models = (await client.get("/v1/models")).json()["data"]
                metrics = (await client.get("/metrics")).text
                return {
                    "answers": dict(zip(names, many, strict=True)),
                    "all": many,
                    **{"sums": sums, "bad": bad, "absent": absent},
                    **{"models": models, "metrics": metrics},
                }
        finally:
            await engine.stop()

    found = asyncio.run(live())
    assert all(answer.status_code == 200 for answer in [*found["all"], found["sums"]])
    assert [answer.status_code for answer in found["bad"]] == [400, 400]
    assert "damaged" in found["bad"][0].text
    assert [answer.status_code for answer in found["absent"]] == [404] * 4
    loads = 'loramux_adapter_load_seconds_count{adapter="%s"} 1.0'
    assert all(loads % name in found["metrics"] for name in ("team/a", "team/b", "org/d"))
    commit = hub.commit_of(tiny_world.adapters["d"])
    roots = {one["id"]: one["root"] for one in found["models"]}
    assert roots["org/d"] == f"org/d@{commit}" and roots["team/a"] == str(root / "team" / "a")
    assert len(hub.bodies) == 2

    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with LLM(
        str(tiny_world.model), enable_lora=True, max_loras=2, max_lora_rank=8, device="cpu"
    ) as llm:
        for name, path in (("team/a", "a"), ("team/b", "b"), ("org/d", "d")):
            lora = LoRARequest(name, 1, str(tiny_world.adapters[path]))
            [wanted] = llm.generate("hello", sampling, lora_request=lora)
            body = found["answers"][name].json()["choices"][0]
            assert body["token_ids"] == wanted.outputs[0].token_ids


def test_others_are_answered_while_one_waits(
    tiny_world: TinyWorld, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine.create(config_of(tiny_world, root, resolver_timeout_s=0.4))
    store = engine._engine.require_store()
    fetch = store._downloads.fetch

    def slowly(path: str) -> Any:
        time.sleep(1.5)
        return fetch(path)

    monkeypatch.setattr(store._downloads, "fetch", slowly)

    async def live() -> None:
        app = create_app(engine, ServerConfig(), owns_engine=False)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        await engine.start()
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

                async def ask(model: str) -> httpx.Response:
                    body = {"model": model, "prompt": "hi", "max_tokens": 2}
                    return await client.post("/v1/completions", json=body, timeout=60)

                waiting = asyncio.create_task(ask("team/a"))
                await asyncio.sleep(0.05)
                for _ in range(3):
                    assert (await ask("base")).status_code == 200
                assert not waiting.done(), "the base model's requests did not wait for the load"
                late = await waiting
                assert late.status_code == 429 and int(late.headers["retry-after"]) > 0
                while "team/a" not in {status.ref.name for status in engine.adapters()}:
                    await asyncio.sleep(0.05)
                assert (await ask("team/a")).status_code == 200
        finally:
            await engine.stop()

    asyncio.run(live())


def test_offline_by_name_hub_and_url(tiny_world: TinyWorld, root: Path, hub: AdapterHub) -> None:
    import fsspec

    hub.repositories["org/d"] = {"v1": tiny_world.adapters["d"], "main": tiny_world.adapters["c"]}
    system = fsspec.filesystem("memory")
    for path in tiny_world.adapters["b"].iterdir():
        system.pipe_file(f"memory://lookup/b/{path.name}", path.read_bytes())
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    settings: dict[str, Any] = {"max_loras": 1, "max_lora_rank": 8, "device": "cpu"}
    with LLM(str(tiny_world.model), enable_lora=True, adapter_roots=[str(root)], **settings) as llm:
        pairs = [
            (LoRARequest("team/a"), "a"),
            (LoRARequest("d", 1, "org/d@v1"), "d"),
            (LoRARequest("b", 2, "memory://lookup/b"), "b"),
            (LoRARequest("d", 1, "org/d@v1"), "d"),  # evicted from the host meanwhile
        ]
        for lora, name in pairs:
            [found] = llm.generate("hello", sampling, lora_request=lora)
            local = LoRARequest("local", 3, str(tiny_world.adapters[name]))
            [wanted] = llm.generate("hello", sampling, lora_request=local)
            assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
        shutil.rmtree(root.parent / "cache")  # a version that is gone from disk is fetched again
        for name in "bc":
            llm.add_lora(LoRARequest("other", 4, str(tiny_world.adapters[name])))
        [found] = llm.generate("hello", sampling, lora_request=pairs[1][0])
        assert found.finished
        with pytest.raises(UnknownModel):
            llm.generate("hello", sampling, lora_request=LoRARequest("team/none"))
