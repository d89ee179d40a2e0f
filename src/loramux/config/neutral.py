"""vLLM's settings that loramux has no use for: accepted where they ask for nothing, else refused.

So a script or a command line that spells out a default moves over unchanged, and one that counts on
something hears that it is not there.
"""

from __future__ import annotations

from typing import Any

from loramux.errors import ConfigError

ANYTHING = object()

# name -> values that ask for nothing here (ANYTHING: whatever it says, answers do not change)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "trust_remote_code": (False,),
    "quantization": (None,),
    "tokenizer_mode": ("auto",),
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "enable_chunked_prefill": (True, None),
    "kv_cache_dtype": ("auto",),
    "skip_tokenizer_init": (False,),
    "swap_space": (ANYTHING,),
    "disable_log_stats": (ANYTHING,),
    "disable_log_requests": (ANYTHING,),
}


def drop_neutral(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without the neutral ones. Raises ConfigError naming every one that is not."""
    refused = [
        f"{name}={value!r} is not served"
        for name, value in settings.items()
        if name in NEUTRAL and ANYTHING not in NEUTRAL[name] and value not in NEUTRAL[name]
    ]
    if refused:
        names = [reason.split("=")[0] for reason in refused]
        raise ConfigError(
            "; ".join(refused),
            field=names[0],
            remedy="; ".join(f"leave {name} at {NEUTRAL[name][0]!r}" for name in names),
        )
    return {name: value for name, value in settings.items() if name not in NEUTRAL}
