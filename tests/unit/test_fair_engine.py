"""A busy tenant and a quiet one on a real model: who waits, and that giving way changes no answer."""

from __future__ import annotations

import random

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from loramux.types import AdapterUse
from tiny import TinyWorld

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_quiet_tenant_does_not_wait_for_long_answers_which_stay_what_they_are(
    tiny_world: TinyWorld, ahead: bool
) -> None:
    dice = random.Random(5 + ahead)
    prompts = [[dice.randrange(3, 100) for _ in range(dice.randint(3, 40))] for _ in range(13)]
    how = {"device": "cpu", "max_loras": 2, "max_lora_rank": 8, "max_num_seqs": 4}
    with LLM(str(tiny_world.model), enable_lora=True, async_scheduling=ahead, **how) as llm:
        engine = llm.engine
        loras = {name: LoRARequest(name, 1, str(tiny_world.adapters[name])) for name in "ab"}
        alone = [
            llm.generate([p], LONG, lora_request=loras["a"])[0].outputs[0].token_ids
            for p in prompts[:-1]
        ]
        quiet = llm.generate([prompts[-1]], SHORT, lora_request=loras["b"])[0].outputs[0].token_ids
        for number, prompt in enumerate(prompts[:-1]):
            engine.submit(str(number), prompt, LONG, [AdapterUse("a")])
        answers: dict[str, list[int]] = {}
        ended: list[str] = []
        for steps in range(10_000):
            if steps == 12:
                assert len(engine.scheduler.running) == 4, "alone it has every seat"
                engine.submit("quiet", prompts[-1], SHORT, [AdapterUse("b")])
            for delta in engine.step():
                answers.setdefault(delta.request_id, []).extend(delta.token_ids)
                ended += [delta.request_id] if delta.finished else []
            if "quiet" in ended and steps < 40:
                standing = {t.name: t for t in engine.stats().tenants}
                assert (standing["b"].running, standing["b"].waiting) == (0, 0)
                assert standing["a"].running + standing["a"].waiting == 12
            if steps > 12 and not engine.has_requests:
                break
        assert ended[0] == "quiet" and engine.scheduler.preemptions >= 1
        assert answers.pop("quiet") == quiet
        assert [answers[str(number)] for number in range(12)] == alone
        engine.check_integrity()


def test_weights_come_with_the_settings(tiny_world: TinyWorld) -> None:
    limits = {"a*": {"weight": 3.0}, "*": {"weight": 0.5}}
    how = {"device": "cpu", "adapter_limits": limits}
    with LLM(str(tiny_world.model), enable_lora=True, **how) as llm:
        lora = LoRARequest("a", 1, str(tiny_world.adapters["a"]))
        llm.generate([[5, 6, 7]] * 2, SHORT, lora_request=[lora, None])
        tenants = llm.engine.scheduler.fair._tenants
        assert {name: t.weight for name, t in tenants.items()} == {"a": 3.0, "": 0.5}
