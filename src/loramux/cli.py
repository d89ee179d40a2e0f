"""`loramux serve | plan | bench | adapter ...`: flags made from the settings, errors in one line.

Every field of the settings is a flag of the same name; where vLLM's flag is named otherwise, that
name is used. Only flags that were given reach the settings, whose defaults then apply.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from loramux.config import (
    EngineConfig,
    LoRAConfig,
    MediaConfig,
    ReplicaConfig,
    ServerConfig,
    sizes,
)
from loramux.config.neutral import ANYTHING, NEUTRAL, drop_neutral
from loramux.config.other_names import other_names
from loramux.errors import ConfigError, LoramuxError

if TYPE_CHECKING:
    from loramux.server.run import AdapterSource

DEBUG_VARIABLE = "LORAMUX_DEBUG"
API_KEY_VARIABLE = "LORAMUX_API_KEY"  # a command line can be read by everybody on a machine
API_KEYS_FILE_VARIABLE = "LORAMUX_API_KEYS_FILE"
EXIT_REFUSED = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# Fields whose flag has another name in vLLM.
FLAG_NAMES = {"target_modules": "--lora-target-modules"}
# Fields that are not flags of their own.
NOT_FLAGS = {"model", "lora", "media", "api_keys"}

Settings = TypeVar("Settings", bound=BaseModel)


class _Parser(argparse.ArgumentParser):
    """Reports its errors like every other one, instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, remedy=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Only LORAMUX_DEBUG=1 lets an exception through."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as leaving:  # argparse after --help and --version
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"loramux: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _one_line(error: Exception) -> str:
    if isinstance(error, LoramuxError):
        return " ".join(str(error).split())
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} (set {DEBUG_VARIABLE}=1 for the traceback)"


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:  # it has a parser of its own
        from loramux.bench import main as bench

        return bench(arguments[1:])
    given = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = given.command
    return command(given)


def build_parser() -> argparse.ArgumentParser:
    from loramux.adapter_commands import add_adapter_commands

    parser = _Parser(
        prog="loramux", description="One base model, many LoRA adapters.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_plan(commands)
    commands.add_parser("bench", help="measure throughput and latency", add_help=False)
    adapter = commands.add_parser("adapter", help="work with adapter folders", allow_abbrev=False)
    add_adapter_commands(adapter.add_subparsers(required=True, metavar="COMMAND"))
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"loramux {version('loramux')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "loramux (not installed)"


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve", help="start the OpenAI-compatible server", allow_abbrev=False
    )
    serve.set_defaults(command=_serve, name="serve")
    serve.add_argument("model_positional", metavar="MODEL", nargs="?", help="local path or Hub id")
    serve.add_argument("--model", help="the same as a flag")
    add_flags(serve.add_argument_group("engine"), EngineConfig)
    lora = serve.add_argument_group("LoRA")
    lora.add_argument("--enable-lora", action="store_true", help="Serve LoRA adapters.")
    lora.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help='Adapters to load at start: name=path, or JSON {"name": ..., "path": ...}.',
    )
    add_flags(lora, LoRAConfig)
    add_flags(serve.add_argument_group("media"), MediaConfig)
    add_flags(serve.add_argument_group("server"), ServerConfig)
    add_flags(serve.add_argument_group("replicas on Ray"), ReplicaConfig)
    _add_neutral(serve)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="show what a start would take of the memory, without loading weights",
        allow_abbrev=False,
    )
    plan.set_defaults(command=_plan, name="plan")
    plan.add_argument("model_positional", metavar="MODEL", nargs="?", help="local path or Hub id")
    plan.add_argument("--model", help="the same as a flag")
    plan.add_argument(
        "--device-memory",
        type=parse_size,
        metavar="BYTES",
        help="plan for a GPU of this size (141GB, 24GiB) instead of this machine's device; with "
        "--device cpu, for so much free memory",
    )
    add_flags(plan.add_argument_group("engine"), EngineConfig)
    lora = plan.add_argument_group("LoRA, which is planned as soon as one of these is given")
    for flag, name in {"--adapters": "max_loras", "--rank": "max_lora_rank"}.items():
        keywords = _argument(name, LoRAConfig.model_fields[name])
        keywords["help"] = f"The same as {flag_of(name)}."
        lora.add_argument(flag, dest=name, default=argparse.SUPPRESS, **keywords)
    add_flags(lora, LoRAConfig)


def _add_neutral(parser: argparse.ArgumentParser) -> None:
    """vLLM's flags that may be given as long as they ask for nothing; not in the help."""
    for name, values in NEUTRAL.items():
        is_switch = isinstance(values[0], bool) or (values[0] is ANYTHING and name != "swap_space")
        kind: dict[str, Any] = {"type": int if isinstance(values[0], int) else str}
        if is_switch:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            flag_of(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kind
        )


def flag_of(field: str) -> str:
    return FLAG_NAMES.get(field, "--" + field.replace("_", "-"))


def add_flags(group: Any, settings: type[BaseModel]) -> None:
    """One flag a field: type, default and help are the field's."""
    for name, field in settings.model_fields.items():
        if name not in NOT_FLAGS:
            group.add_argument(
                flag_of(name), dest=name, default=argparse.SUPPRESS, **_argument(name, field)
            )
    for other, name in other_names(settings.model_fields).items():
        keywords = _argument(name, settings.model_fields[name])
        keywords["help"] = f"The same as {flag_of(name)}."
        group.add_argument(flag_of(other), dest=other, default=argparse.SUPPRESS, **keywords)


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """argparse's keywords for one field."""
    kind = _without_none(field.annotation)
    text = " ".join((field.description or "").split())
    default = field.get_default(call_default_factory=True)
    if default not in (None, []):
        text += f" (default: {default})"
    keywords: dict[str, Any] = {"help": text.replace("%", "%%")}
    origin = get_origin(kind)
    if kind is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif origin is Literal:
        keywords["choices"] = list(get_args(kind))
    elif origin is list:
        keywords |= {"nargs": "+", "metavar": "NAME"}
    elif origin is dict:
        keywords |= {"type": _json_object, "metavar": "JSON"}
    elif kind is int and name.endswith("_bytes"):
        keywords |= {"type": parse_size, "metavar": "BYTES"}
    else:
        keywords |= {"type": str if kind is SecretStr else kind, "metavar": _metavar(kind)}
    return keywords


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _without_none(annotation: Any) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    is_optional = len(kinds) == 1 and type(None) in get_args(annotation)
    return kinds[0] if is_optional else annotation


def parse_size(text: str) -> int:
    """`config.sizes.parse_size`, whose refusal argparse shows as it is."""
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def settings_from(settings: type[Settings], given: argparse.Namespace, **more: Any) -> Settings:
    """The settings, from the flags that were given. Raises ConfigError naming the flag."""
    names = [*settings.model_fields, *other_names(settings.model_fields)]
    values = {name: getattr(given, name) for name in names if name in given}
    try:
        return settings(**{**values, **more})
    except ValidationError as error:
        raise ConfigError("; ".join(_faults(error))) from error


def _faults(error: ValidationError) -> Iterable[str]:
    for fault in error.errors():
        cause = fault.get("ctx", {}).get("error")
        text = str(cause) if cause is not None else fault["msg"]
        yield f"{flag_of(str(fault['loc'][0]))}: {text}" if fault["loc"] else text


def lora_settings(given: argparse.Namespace) -> LoRAConfig | None:
    """The LoRA settings with --enable-lora. Raises ConfigError for a LoRA flag without it."""
    if given.enable_lora:
        return settings_from(LoRAConfig, given)
    orphans = [flag_of(name) for name in LoRAConfig.model_fields if name in given]
    if given.lora_modules:
        orphans.append("--lora-modules")
    for name in ("allow_runtime_lora_updating", "allow_adapter_push"):
        orphans += [flag_of(name)] if getattr(given, name, False) else []
    if orphans:
        verb = "needs" if len(orphans) == 1 else "need"
        raise ConfigError(f"{', '.join(orphans)} {verb} --enable-lora", remedy="add --enable-lora")
    return None


def parse_modules(items: Sequence[str], model_names: Sequence[str]) -> list[AdapterSource]:
    """`name=path` and JSON forms of --lora-modules. Raises ConfigError."""
    from loramux.server.adapter_paths import check_name
    from loramux.server.run import AdapterSource

    sources: list[AdapterSource] = []
    for item in items:
        if item.lstrip().startswith(("{", "[")):
            source = AdapterSource(*_module_from_json(item, model_names))
        else:
            name, divider, path = item.partition("=")
            if not (name and divider and path):
                raise ConfigError(
                    f"--lora-modules {item!r} is not of the form name=path",
                    remedy='write name=path or {"name": ..., "path": ...}; MODEL comes first',
                )
            source = AdapterSource(name, path)
        check_name(source.name)
        if source.name in model_names or source.name in {known.name for known in sources}:
            raise ConfigError(
                f"--lora-modules: the name {source.name!r} is taken", remedy="choose another"
            )
        sources.append(source)
    return sources


def _module_from_json(item: str, model_names: Sequence[str]) -> tuple[str, str]:
    try:
        value = json.loads(item)
    except ValueError as error:
        raise ConfigError(f"--lora-modules {item!r} is no JSON: {error}") from error
    known = {"name", "path", "base_model_name"}
    if (
        not isinstance(value, dict)
        or not set(value) <= known
        or not all(isinstance(value.get(key), str) and value[key] for key in ("name", "path"))
    ):
        raise ConfigError(
            f"--lora-modules {item!r} is refused", remedy='write {"name": ..., "path": ...}'
        )
    base = value.get("base_model_name")
    if base is not None and base not in model_names:
        raise ConfigError(
            f"--lora-modules {value['name']!r}: base_model_name {base!r} is not served",
            remedy=f"leave it out, or name {model_names[0]!r}",
        )
    return value["name"], value["path"]


def _model_of(given: argparse.Namespace) -> str:
    named = {name for name in (given.model_positional, given.model) if name}
    if len(named) == 1:
        return str(named.pop())
    if named:
        raise ConfigError("MODEL and --model name two models", remedy="give one of them")
    raise ConfigError("no model is named", remedy=f"loramux {given.name} MODEL")


def _serve(given: argparse.Namespace) -> int:
    config = settings_from(
        EngineConfig,
        given,
        model=_model_of(given),
        lora=lora_settings(given),
        media=settings_from(MediaConfig, given),
    )
    if key := os.environ.get(API_KEY_VARIABLE):  # empty counts as unset
        given.api_key = getattr(given, "api_key", key)
    if path := os.environ.get(API_KEYS_FILE_VARIABLE):
        given.api_keys_file = getattr(given, "api_keys_file", path)
    server_config = settings_from(ServerConfig, given)
    server_config.all_keys()  # a file that cannot be read is refused now, not after minutes
    replica_config = settings_from(ReplicaConfig, given)
    drop_neutral({name: getattr(given, name) for name in NEUTRAL if name in given})
    adapters = parse_modules(given.lora_modules or [], config.model_names)
    if replica_config.on_ray:
        from loramux.replicas.run import serve as serve_replicas

        return serve_replicas(config, server_config, replica_config, adapters)
    from loramux.server.run import serve

    return serve(config, server_config, adapters)


def _plan(given: argparse.Namespace) -> int:
    """Print the memory table of a start with these flags."""
    with_lora = any(name in given for name in LoRAConfig.model_fields)
    lora = settings_from(LoRAConfig, given) if with_lora else None
    config = settings_from(EngineConfig, given, model=_model_of(given), lora=lora)
    from rich.console import Console

    from loramux.engine.memory_table import show
    from loramux.engine.plan_start import other_pool_bytes, plan_before_start

    console = Console()
    show(plan_before_start(config, given.device_memory), console)
    if (other := other_pool_bytes(config, given.device_memory)) is not None:
        assert config.lora is not None
        how = "Without" if config.lora.fully_sharded_loras else "With"
        size = sizes.format_size(other)
        console.print(f"{how} --fully-sharded-loras the adapter pool takes {size} a rank.")
    return 0
