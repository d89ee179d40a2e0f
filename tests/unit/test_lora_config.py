"""Every field of LoRAConfig: names, defaults, validation, hash, and what is refused for now."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from loramux.config import LoRAConfig, ModelFacts
from loramux.config import lora as lora_module
from loramux.config.lora import DUAL_STREAM_VARIABLE, HASHED_FIELDS, UNHASHED_FIELDS

DEFAULTS = {
    "max_lora_rank": 16,
    "max_loras": 1,
    "fully_sharded_loras": False,
    "max_cpu_loras": 1,
    "lora_dtype": "auto",
    "target_modules": None,
    "default_mm_loras": None,
    "default_mm_loras_policy": "compose",
    "enable_tower_connector_lora": False,
    "enable_vocabulary_lora": False,
    "max_lora_vocabulary_rows": 0,
    "allow_partial_adapters": False,
    "specialize_active_lora": False,
    "enable_mixed_moe_lora_format": False,
    "enable_moe_shared_loras": False,
    "max_lora_cls_labels": None,
    "max_registered_adapters": None,
    "max_adapter_bytes": None,
    "adapter_roots": None,
    "adapter_repositories": None,
    "resolver_timeout_s": 60.0,
    "resolver_negative_ttl_s": 30.0,
    "adapter_fetch_timeout_s": 300.0,
    "max_adapter_download_bytes": 8 << 30,
    "verify_adapters": False,
    "lora_tokenizers": "auto",
}
CHANGED = {
    "max_lora_rank": 17,
    "max_loras": 2,
    "fully_sharded_loras": True,
    "max_cpu_loras": 9,
    "lora_dtype": "float32",
    "target_modules": ["q_proj"],
    "default_mm_loras": {"image": "somewhere"},
    "default_mm_loras_policy": "none",
    "enable_tower_connector_lora": True,
    "enable_vocabulary_lora": True,
    "max_lora_vocabulary_rows": 7,
    "allow_partial_adapters": True,
    "specialize_active_lora": True,
    "enable_mixed_moe_lora_format": True,
    "enable_moe_shared_loras": True,
    "max_lora_cls_labels": 5,
    "max_registered_adapters": 7,
    "max_adapter_bytes": 4096,
    "adapter_roots": ["somewhere"],
    "adapter_repositories": ["org/*"],
    "resolver_timeout_s": 1.0,
    "resolver_negative_ttl_s": 2.0,
    "adapter_fetch_timeout_s": 3.0,
    "max_adapter_download_bytes": 4,
    "verify_adapters": True,
    "lora_tokenizers": "base",
}
FACTS = ModelFacts("bfloat16", "cpu", 512, 1024, 1 << 30)


def test_names_and_defaults() -> None:
    assert LoRAConfig().model_dump() == DEFAULTS


def test_every_field_is_hashed_or_declared_irrelevant() -> None:
    declared = [*HASHED_FIELDS, *UNHASHED_FIELDS]
    assert sorted(declared) == sorted(LoRAConfig.model_fields), "a new field is in neither list"
    assert len(declared) == len(set(declared))


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_hash_changes_exactly_for_hashed_fields(name: str) -> None:
    base = LoRAConfig(max_cpu_loras=8).compute_hash()
    changed = LoRAConfig(**{"max_cpu_loras": 8, name: CHANGED[name]}).compute_hash()
    assert (changed != base) == (name in HASHED_FIELDS)


def test_hash_is_stable_across_processes_and_order() -> None:
    code = (
        "from loramux.config import LoRAConfig;"
        "print(LoRAConfig(target_modules=['b', 'a'], max_loras=3).compute_hash())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {LoRAConfig(target_modules=["a", "b"], max_loras=3).compute_hash()}


@pytest.mark.parametrize("rank", [1, 3, 7, 16, 100, 511])
def test_any_rank(rank: int) -> None:
    assert LoRAConfig(max_lora_rank=rank).max_lora_rank == rank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"max_loras": 0}, "max_loras"),
        ({"max_loras": 4, "max_cpu_loras": 3}, r"max_cpu_loras \(3\) must be >= max_loras \(4\)"),
        ({"lora_dtype": "int8"}, "lora_dtype"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [" "]}, "target_modules"),
        ({"max_lora_ranks": 8}, "max_lora_ranks"),
        ({"default_mm_loras": {"smell": "p", "image": "q"}}, "'smell', and there are image, audio"),
        ({"default_mm_loras": {"image": "", "audio": ""}}, "no path for image, audio"),
        ({"default_mm_loras": "p"}, "default_mm_loras"),
        ({"default_mm_loras_policy": "sum"}, "default_mm_loras_policy"),
    ],
)
def test_refused_values(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_max_cpu_loras_defaults_to_max_loras() -> None:
    assert LoRAConfig(max_loras=5).max_cpu_loras == 5
    assert LoRAConfig(max_loras=5, max_cpu_loras=7).host_capacity == 7


def test_torch_dtypes_and_none_are_accepted() -> None:
    import torch

    assert LoRAConfig(lora_dtype=torch.float16).lora_dtype == "float16"
    assert LoRAConfig(lora_dtype=None).lora_dtype == "auto"


def test_verify_fills_dtype_in_a_new_object() -> None:
    config = LoRAConfig()
    verified = config.verify_with_model_config(FACTS)
    assert (verified.lora_dtype, config.lora_dtype) == ("bfloat16", "auto")
    kept = LoRAConfig(lora_dtype="float32").verify_with_model_config(FACTS)
    assert kept.lora_dtype == "float32"


def test_dual_stream_is_refused_off_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_module, "_cuda_is_present", lambda: False)
    monkeypatch.setenv(DUAL_STREAM_VARIABLE, "1")
    with pytest.raises(ValueError, match=DUAL_STREAM_VARIABLE):
        LoRAConfig()


def test_dual_stream_under_full_sharding_is_off_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lora_module, "_cuda_is_present", lambda: True)
    monkeypatch.setattr(lora_module, "_warned_dual_stream", False)
    monkeypatch.setenv(DUAL_STREAM_VARIABLE, "1")
    before = dict(os.environ)
    with caplog.at_level(logging.WARNING):
        configs = [LoRAConfig(fully_sharded_loras=True) for _ in range(3)]
        assert not any(config.dual_stream("cuda") for config in configs)
    assert len(caplog.records) == 1
    assert dict(os.environ) == before
    assert LoRAConfig().dual_stream("cuda:0")


@pytest.mark.parametrize(
    "pattern",
    ["*", "*/*", "*/name", "org", "org/a/b", "org/", "org/x@", "org/x@*", "../x", "o/x y"],
)
def test_repositories_write_their_organisation_out(pattern: str) -> None:
    with pytest.raises(ValidationError, match="organisation"):
        LoRAConfig(adapter_repositories=[pattern])


def test_lookups_are_off_unless_named() -> None:
    assert not LoRAConfig().resolves
    assert LoRAConfig(adapter_roots=["a"]).resolves
    assert LoRAConfig(adapter_repositories=["org/a-*@v1"]).resolves
    for name in ("adapter_roots", "adapter_repositories"):
        for value in ([], [" "]):
            with pytest.raises(ValidationError, match=name):
                LoRAConfig(**{name: value})
