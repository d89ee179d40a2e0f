"""`loramux adapter check | convert`: what is said of adapter folders, and how old ones become new."""

from __future__ import annotations

import argparse
from typing import Any

from loramux.cli import EXIT_REFUSED, add_flags, settings_from
from loramux.config import LoRAConfig
from loramux.errors import AdapterRejected


def add_adapter_commands(commands: Any) -> None:
    check = commands.add_parser(
        "check", help="say what each tensor of an adapter binds to", allow_abbrev=False
    )
    check.set_defaults(command=_check)
    check.add_argument(
        "path", metavar="PATH", help="the adapter: a folder, org/name@revision or URL"
    )
    check.add_argument("--model", required=True, help="local path or Hub id of the base model")
    check.add_argument(
        "--numeric",
        action="store_true",
        help="also compare the deltas with PEFT's on random activations, and fail above a bound",
    )
    add_flags(check.add_argument_group("LoRA"), LoRAConfig)
    convert = commands.add_parser(
        "convert",
        help="write an adapter that cannot be served as it is as one that can",
        allow_abbrev=False,
    )
    convert.set_defaults(command=_convert)
    convert.add_argument("source", metavar="SRC", help="the adapter's folder")
    convert.add_argument("target", metavar="DST", help="the folder to write, which must not exist")
    convert.add_argument(
        "--base", metavar="MODEL", help="of PiSSA and OLoRA: the base model it was trained on"
    )
    convert.add_argument(
        "--initial",
        metavar="FOLDER",
        help="of PiSSA, OLoRA, CorDA and LoRA-GA: the adapter as it was saved before training",
    )


def _check(given: argparse.Namespace) -> int:
    """Print what each tensor binds to (0), or every reason for the refusal (1)."""
    config = settings_from(LoRAConfig, given)
    from loramux.llm import check_adapter

    try:
        report = check_adapter(given.path, given.model, config)
    except AdapterRejected as error:
        return _refused(error)
    print(report.format())
    if not given.numeric:
        return 0
    from loramux.llm import check_deltas_of

    numbers = check_deltas_of(given.path, given.model, config)
    print(numbers.format())
    return 0 if numbers.passed else EXIT_REFUSED


def _convert(given: argparse.Namespace) -> int:
    """Write DST and say what it is (0), or every reason for the refusal (1)."""
    from loramux.adapters.convert import convert_adapter

    try:
        said = convert_adapter(given.source, given.target, base=given.base, initial=given.initial)
    except AdapterRejected as error:
        return _refused(error)
    print(said)
    return 0


def _refused(error: AdapterRejected) -> int:
    print(f"adapter {error.adapter!r} is refused:")
    for reason in error.reasons:
        print(f"  - {reason}")
    if error.remedy:
        print(f"remedy: {error.remedy}")
    return EXIT_REFUSED
