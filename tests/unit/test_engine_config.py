"""`resolve` turns every "auto" into a value, or says what to change."""

from __future__ import annotations

import pytest

from loramux.config import EngineConfig, ModelFacts, num_blocks, resolve
from loramux.config.keywords import engine_config
from loramux.errors import ConfigError

FACTS = ModelFacts("float32", "cpu", 1000, 100, 1 << 30)


def test_cpu_defaults() -> None:
    config = resolve(EngineConfig(model="m"), FACTS)
    assert config.max_model_len == 1000
    assert config.max_num_batched_tokens == 512
    # A quarter of the memory would be more than 256 full sequences can fill.
    assert config.kv_cache_memory_bytes == 1016 * 256 * 100
    assert num_blocks(config, FACTS) == 1016 * 256 * 100 // 1600
    assert EngineConfig(model="m").max_model_len is None


def test_gpu_defaults() -> None:
    facts = ModelFacts("float32", "cuda", 1000, 100, 10 << 30, total_bytes=10 << 30)
    config = resolve(EngineConfig(model="m"), facts)
    assert (config.max_num_batched_tokens, config.async_scheduling) == (8192, True)


def test_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len 1001"):
        resolve(EngineConfig(model="m", max_model_len=1001), FACTS)


def test_small_cache_shortens_the_default_length_but_not_a_wish() -> None:
    assert (
        resolve(EngineConfig(model="m", kv_cache_memory_bytes=50_000), FACTS).max_model_len == 484
    )
    with pytest.raises(ConfigError, match="cannot hold"):
        resolve(EngineConfig(model="m", kv_cache_memory_bytes=50_000, max_model_len=600), FACTS)


def test_the_kv_cache_has_two_names_and_a_size_in_words() -> None:
    for size, expected in (("40GiB", 40 << 30), ("1.5 MiB", 3 << 19), ("5000", 5000), (7, 7)):
        for name in ("kv_cache_memory", "kv_cache_memory_bytes"):
            assert EngineConfig(model="m", **{name: size}).kv_cache_memory_bytes == expected
            given = engine_config("m", **{name: size})
            assert given.kv_cache_memory_bytes == expected


@pytest.mark.parametrize("size", ["lots", "12 parsecs", "-1", "", "0", 0])
def test_a_size_that_is_none_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match=r"no size|greater than or equal to 1"):
        EngineConfig(model="m", kv_cache_memory=size)


def test_two_sizes_for_one_setting_are_refused() -> None:
    with pytest.raises(ValueError, match="are one setting"):
        EngineConfig(model="m", kv_cache_memory="1GiB", kv_cache_memory_bytes=5)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="blocksize"):
        EngineConfig(model="m", blocksize=16)


def test_every_field_is_documented() -> None:
    from loramux.config import LoRAConfig, ServerConfig

    for section in (EngineConfig, LoRAConfig, ServerConfig):
        missing = [n for n, f in section.model_fields.items() if not f.description and n != "host"]
        assert not missing, f"{section.__name__}: {missing}"


@pytest.mark.parametrize("sizes", [[0], [8, -1], [1025]])
def test_graphs_are_made_for_small_steps(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 1024"):
        EngineConfig(model="m", cudagraph_capture_sizes=sizes)
