"""The offline API in vLLM's shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from loramux.errors import AdapterRejected, ConfigError, InvalidField
from loramux.llm import check_adapter
from tiny import TinyWorld

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_world: TinyWorld) -> Iterator[LLM]:
    with LLM(
        model=str(tiny_world.model), enable_lora=True, max_loras=3, max_lora_rank=8, device="cpu"
    ) as llm:
        yield llm
        llm.engine.check_integrity()


def test_prompt_spellings_agree(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    spellings = ["hello", {"prompt": "hello"}, {"prompt_token_ids": ids}, ids]
    outputs = llm.generate(spellings, GREEDY)  # type: ignore[arg-type]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert outputs[0].prompt == "hello" and outputs[0].prompt_token_ids == ids
    assert outputs[0].finished and outputs[0].outputs[0].finish_reason == "length"
    [single] = llm.generate("hello", GREEDY)
    assert single.outputs[0].text == outputs[0].outputs[0].text
    [without_media] = llm.generate({"prompt": "hello", "multi_modal_data": {}}, GREEDY)
    assert without_media.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    with pytest.raises(InvalidField, match=r"multi_modal_data has image.*takes text only"):
        llm.generate({"prompt": "x", "multi_modal_data": {"image": "a.png"}}, GREEDY)
    with pytest.raises(InvalidField, match="cache_salt"):
        llm.generate({"prompt": "x", "cache_salt": "y"}, GREEDY)


def test_lora_requests_in_every_form(llm: LLM, tiny_world: TinyWorld) -> None:
    a, b = (LoRARequest(n, i, str(tiny_world.adapters[n])) for i, n in enumerate("ab", 1))
    base, with_a, with_b = (
        llm.generate("hello", GREEDY, lora_request=x)[0].outputs[0].token_ids for x in (None, a, b)
    )
    both = llm.generate("hello", GREEDY, lora_request=[a, b])[0]
    assert both.lora_request == [a, b]
    outputs = llm.generate(["hello"] * 4, GREEDY, lora_request=[None, a, b, [a, b]])
    assert [o.outputs[0].token_ids for o in outputs] == [
        base,
        with_a,
        with_b,
        both.outputs[0].token_ids,
    ]
    assert len({tuple(x) for x in (base, with_a, with_b)}) == 3
    zero = LoRARequest("a", 77, str(tiny_world.adapters["a"]), scale=0.0)
    assert llm.generate("hello", GREEDY, lora_request=zero)[0].outputs[0].token_ids == base
    with pytest.raises(InvalidField, match="2 entries for 3 prompts"):
        llm.generate(["x"] * 3, GREEDY, lora_request=[a, b])


def test_a_name_that_means_another_folder_is_another_version(
    llm: LLM, tiny_world: TinyWorld
) -> None:
    answers = [
        llm.generate("hello", GREEDY, lora_request=LoRARequest("n", 1, str(path)))[0].outputs[0]
        for path in (tiny_world.adapters["a"], tiny_world.adapters["b"])
    ]
    assert answers[0].token_ids != answers[1].token_ids


def test_chat(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([one, one], [GREEDY, GREEDY])
    assert outputs[0].prompt == "<user>hi\n<assistant>"
    assert llm.chat(one, GREEDY)[0].outputs[0].text == outputs[1].outputs[0].text


def test_n_answers_with_seeds(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=3, n=4, max_tokens=6, ignore_eos=True)
    first, again = (llm.generate("hello", params)[0].outputs for _ in range(2))
    assert [a.token_ids for a in first] == [a.token_ids for a in again]
    assert [a.index for a in first] == [0, 1, 2, 3]
    assert len({tuple(a.token_ids) for a in first}) > 1
    beside = llm.generate(["other"] * 3 + ["hello"], params)[3].outputs
    assert [a.token_ids for a in beside] == [a.token_ids for a in first]


def test_logprobs(llm: LLM) -> None:
    [output] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=3, logprobs=2))
    answer = output.outputs[0]
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    chosen = [entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(item.logprob for item in chosen))
    for entry, item in zip(answer.logprobs, chosen, strict=True):
        assert len(entry) == 2 and next(iter(entry.values())) == item and item.rank == 1
        assert llm.get_tokenizer().decode([item.token_id]) == item.decoded_token


def test_answers_end_where_the_context_does(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    [output] = llm.generate([5] * 250, params)
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


def test_bad_adapters_are_refused_before_anything_runs(llm: LLM, tiny_world: TinyWorld) -> None:
    with pytest.raises(AdapterRejected, match="is missing"):
        llm.generate("x", GREEDY, lora_request=LoRARequest("bad", 1, str(tiny_world.model)))
    with pytest.raises(InvalidField, match="no lora_path"):
        llm.generate("x", GREEDY, lora_request=LoRARequest("bad", 1))
    with (
        LLM(str(tiny_world.model), device="cpu") as plain,
        pytest.raises(ConfigError, match="enable_lora"),
    ):
        plain.generate("x", GREEDY, lora_request=LoRARequest("a", 1, "x"))


def test_add_lora_reads_ahead(llm: LLM, tiny_world: TinyWorld) -> None:
    assert llm.add_lora(LoRARequest("ahead", 1, str(tiny_world.adapters["c"])))
    assert "ahead" in {s.ref.name for s in llm.engine.adapters()}


def test_check_adapter_needs_no_weights(tiny_world: TinyWorld) -> None:
    report = check_adapter(str(tiny_world.adapters["c"]), str(tiny_world.model))
    assert (report.name, report.max_r, report.num_modules) == ("c", 2, 21)


def test_vllm_settings_that_ask_for_nothing_are_accepted(tiny_world: TinyWorld) -> None:
    neutral = {"pipeline_parallel_size": 1, "enforce_eager": True, "trust_remote_code": False}
    with LLM(str(tiny_world.model), device="cpu", **neutral) as llm:
        assert llm.generate("x", GREEDY)
    with pytest.raises(ConfigError) as caught:
        LLM(str(tiny_world.model), pipeline_parallel_size=2, quantization="awq", device="cpu")
    assert "pipeline_parallel_size=2" in str(caught.value) and "quantization" in str(caught.value)
