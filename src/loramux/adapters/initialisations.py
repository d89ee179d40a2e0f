"""What `init_lora_weights` says about A and B: a difference to the base model, or to another one.

                       base weights       what PEFT saves, unless it is told to convert      served
    true, gaussian,
    eva, orthogonal,   as they were       A and B, the difference to them                    as it is
    mica
    pissa, olora       W - scale B0 A0    A and B, relative to those; A0 and B0 follow       after
                                          from W                                             --base
    pissa_niter_N,
    corda, lora_ga     W - scale B0 A0    A and B; A0 and B0 do not follow from W            after
                                                                                             --initial
    loftq              quantised          A and B, relative to the quantised weights         never

PEFT's own conversion (`path_initial_model_for_weight_conversion`) writes `true` and twice the rank: an
ordinary adapter. Its documentation sets `true` before the initial adapter is saved, so an adapter that
was trained on and saved without conversion may say `true` as well; nothing in its file tells.
"""

from __future__ import annotations

PLAIN = {"gaussian", "eva", "orthogonal", "mica"}
FROM_BASE = {"pissa", "olora"}
FROM_INITIAL = {"corda", "lora_ga"}
CONVERT = "loramux adapter convert"


def kind_of(init: object) -> str:
    """`init_lora_weights` as one word: "plain", "pissa", "olora", "initial", "loftq" or "unknown"."""
    if not isinstance(init, str):
        return "plain"
    # PEFT compares these with lower case, the others as they are.
    if init.lower() in ("gaussian", "olora", "mica"):
        init = init.lower()
    if init in PLAIN:
        return "plain"
    if init in FROM_BASE:
        return init
    if init.startswith("pissa_niter_") or init in FROM_INITIAL:
        return "initial"
    return "loftq" if init == "loftq" else "unknown"


def reason_against(init: object) -> str | None:
    """Why an adapter that says so cannot be served as it is, and how it can be."""
    kind = kind_of(init)
    if kind == "plain":
        return None
    said = f"init_lora_weights={init!r}"[:80]
    if kind in FROM_BASE:
        return (
            f"{said} changed the base weights, and A and B are relative to those; "
            f"{CONVERT} --base MODEL SRC DST makes an ordinary adapter of it"
        )
    if kind == "initial":
        return (
            f"{said} changed the base weights in a way that the file does not tell; "
            f"{CONVERT} --initial FOLDER SRC DST makes an ordinary adapter of it and of the one that "
            "was saved before training"
        )
    if kind == "loftq":
        return (
            f"{said} quantised the base weights, and A and B are relative to those: it is no difference "
            "of low rank to the original ones, and cannot be converted to one"
        )
    return f"{said} is unknown to loramux; it may change the base weights"
