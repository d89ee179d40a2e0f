"""The command line: flags become settings, faults become one line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_engine import FakeEngine

from loramux.cli import build_parser, flag_of, main, parse_size
from loramux.config import EngineConfig, LoRAConfig, MediaConfig, ServerConfig
from loramux.errors import AdapterNotFound, AdapterRejected
from loramux.server import run
from loramux.server.run import AdapterSource


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `serve` would have been called with."""
    calls: list[Any] = []

    def serve(*arguments: Any) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(run, "serve", serve)
    return calls


def test_defaults(served: list[Any]) -> None:
    assert main(["serve", "m"]) == 0
    assert served == [(EngineConfig(model="m"), ServerConfig(), [])]


def test_the_key_may_come_from_the_environment(
    served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"": None, "secret": "secret"}
    for value, expected in keys.items():
        monkeypatch.setenv("LORAMUX_API_KEY", value)
        assert main(["serve", "m"]) == 0
        key = served.pop()[1].api_key
        assert (key and key.get_secret_value()) == expected
    assert main(["serve", "m", "--api-key", "other"]) == 0
    assert served.pop()[1].api_key.get_secret_value() == "other", "a flag goes first"


def test_the_file_of_keys_is_read_before_anything_else(
    served: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "keys.json"
    monkeypatch.setenv("LORAMUX_API_KEYS_FILE", str(file))
    assert main(["serve", "m"]) == 2 and not served
    assert "cannot be read" in capsys.readouterr().err
    file.write_text('[{"name": "x", "key": "0123456789abcdef"}]')
    assert main(["serve", "m"]) == 0
    assert [key.name for key in served.pop()[1].all_keys()] == ["x"]


def test_every_setting_is_a_flag_and_reaches_the_settings(
    served: list[Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('[{"name": "x", "key": "0123456789abcdef"}]')
    flags = (
        "serve m --tokenizer t --revision r --served-model-name a b --dtype float32 --device cpu "
        "--seed 3 --tensor-parallel-size 2 --rank-timeout-s 9 --max-model-len 512 --block-size 8 "
        "--disable-custom-all-reduce "
        "--kv-cache-memory-bytes 512MiB "
        "--gpu-memory-utilization 0.5 --no-enable-prefix-caching --max-num-seqs 4 "
        "--max-num-batched-tokens 64 --max-queue-len 9 --adapter-patience-s 1.5 "
        "--async-scheduling --enforce-eager --load-format dummy --cudagraph-capture-sizes 1 2 "
        "--chat-template c --enable-lora --max-lora-rank 24 --max-loras 3 --max-cpu-loras 5 "
        "--lora-dtype float32 --lora-target-modules q_proj v_proj --fully-sharded-loras "
        "--enable-vocabulary-lora --max-lora-vocabulary-rows 6 "
        "--enable-tower-connector-lora --allow-partial-adapters --specialize-active-lora "
        "--enable-mixed-moe-lora-format --enable-moe-shared-loras --max-lora-cls-labels 7 "
        "--host 0.0.0.0 --port 1234 --api-key k "
        "--allow-runtime-lora-updating --lora-root / --max-body-bytes 1MiB --shutdown-timeout-s 2 "
        "--default-mm-loras-policy refuse --encoder-cache-tokens 99 --adapter-roots /a memory://b "
        "--adapter-repositories org/* --resolver-timeout-s 7 --resolver-negative-ttl-s 8 "
        "--adapter-fetch-timeout-s 9 --max-adapter-download-bytes 1GiB --verify-adapters "
        "--max-lora-cls-labels 9 --allowed-media-domains a.test .b.test "
        "--allowed-media-roots /m --max-media-bytes 1MiB --max-image-pixels 9 --max-video-frames 2 "
        "--max-video-pixels 99 --max-audio-s 1.5 --fetch-timeout-s 2.5 --max-redirects 0 "
        "--encoder-cache-tokens 640 --lora-tokenizers base"
    )
    line = flags.split()
    line += ["--max-registered-adapters", "9", "--max-adapter-bytes", "1MiB"]
    line += ["--api-keys-file", str(keys), "--allow-adapter-push"]
    line += ["--default-mm-loras", '{"image": "p"}']
    line += ["--adapter-limits", '{"x": {"weight": 2}}']
    line += ["--max-items-per-request", '{"image": 3}']
    line += ["--lora-modules", "x=/p=q", '{"name": "y", "path": "/z", "base_model_name": "a"}']
    assert main(line) == 0
    engine, server, modules = served[0]
    assert engine.model == "m" and engine.lora is not None
    for settings in (engine, engine.lora, engine.media, server):
        # Every field was set to something else than its default: none was forgotten.
        for name, field in type(settings).model_fields.items():
            if name == "api_keys":
                continue  # no flag
            default = None if name == "model" else field.get_default(call_default_factory=True)
            assert getattr(settings, name) != default, flag_of(name)
    assert engine.kv_cache_memory_bytes == 512 << 20
    assert engine.lora.target_modules == ["q_proj", "v_proj"]
    assert modules == [AdapterSource("x", "/p=q"), AdapterSource("y", "/z")]


def test_the_short_name_of_the_kv_cache(served: list[Any]) -> None:
    assert main(["serve", "m", "--kv-cache-memory", "40GiB"]) == 0
    assert served[0][0].kv_cache_memory_bytes == 40 << 30


def test_vllms_names_of_media_settings(served: list[Any]) -> None:
    line = [
        "serve",
        "m",
        "--limit-mm-per-prompt",
        '{"image": 2}',
        "--allowed-local-media-path",
        "/m",
    ]
    assert main(line) == 0
    media = served[0][0].media
    assert media.max_items_per_request == {"image": 2, "audio": 4, "video": 1}
    assert media.allowed_media_roots == ["/m"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["serve"], "loramux serve MODEL"),
        (["serve", "a", "--model", "b"], "--model"),
        (["serve", "a", "--max-lora", "2"], "--max-lora"),
        (["serve", "a", "--port", "x"], "--port"),
        (["serve", "a", "--port", "70000"], "--port: "),
        (["serve", "a", "--dtype", "int3"], "--dtype"),
        (["serve", "a", "--kv-cache-memory-bytes", "lots"], "512MiB"),
        (["serve", "a", "--kv-cache-memory", "many"], "512MiB"),
        (
            ["serve", "a", "--kv-cache-memory", "1GiB", "--kv-cache-memory-bytes", "2GiB"],
            "are one setting",
        ),
        (["serve", "a", "--max-loras", "2"], "--max-loras needs --enable-lora"),
        (
            ["serve", "a", "--lora-modules", "x=y", "--max-loras", "2"],
            "--max-loras, --lora-modules need --enable-lora",
        ),
        (
            ["serve", "a", "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "2"],
            "max_cpu_loras (2) must be >= max_loras (4)",
        ),
        (["serve", "a", "--enable-lora", "--max-lora-rank", "0"], "--max-lora-rank: "),
        (["serve", "a", "--enable-lora", "--default-mm-loras", "[1]"], "JSON object"),
        (["serve", "a", "--enable-lora", "--default-mm-loras", '{"smell": "p"}'], "'smell'"),
        (["serve", "a", "--enable-lora", "--default-mm-loras", '{"image": ""}'], "no path"),
        (["serve", "a", "--default-mm-loras-policy", "none"], "needs --enable-lora"),
        (["serve", "a", "--enable-lora", "--lora-modules", "~image=x"], "~image"),
        (["serve", "a", "--allowed-media-domains", "http://a.test"], "--allowed-media-domains: "),
        (["serve", "a", "--limit-mm-per-prompt", '{"smell": 1}'], "--max-items-per-request: "),
        (["serve", "a", "--enable-lora", "--lora-modules", "x"], "name=path"),
        (["serve", "a", "--enable-lora", "--lora-modules", "{"], "no JSON"),
        (["serve", "a", "--enable-lora", "--lora-modules", '{"name": "x"}'], "path"),
        (["serve", "a", "--enable-lora", "--lora-modules", "x=y", "x=z"], "taken"),
        (["serve", "a", "--enable-lora", "--lora-modules", "a=z"], "taken"),
        (["serve", "a", "--enable-lora", "--lora-modules", "../x=z"], "../x"),
        (["serve", "a", "--allow-runtime-lora-updating", "--enable-lora"], "lora_root"),
        (["serve", "a", "--allow-runtime-lora-updating", "--lora-root", "/"], "--enable-lora"),
        (["adapter", "check", "p"], "--model"),
    ],
    ids=" ".join,
)
def test_faults_are_one_line(
    served: list[Any], capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("loramux: error: ") and error.count("\n") == 1
    assert said in error
    assert served == []


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_DEBUG", "1")
    with pytest.raises(ValueError, match="no model"):
        main(["serve"])


def test_an_unexpected_error_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: Any) -> int:
        raise OSError("the disk\nis full")

    monkeypatch.setattr(run, "serve", serve)
    assert main(["serve", "m"]) == 2
    error = capsys.readouterr().err
    assert "OSError: the disk is full" in error and "LORAMUX_DEBUG=1" in error


@pytest.mark.parametrize("line", [["--help"], ["serve", "--help"], ["adapter", "check", "--help"]])
def test_help(capsys: pytest.CaptureFixture[str], line: list[str]) -> None:
    assert main(line) == 0
    assert "usage: loramux" in capsys.readouterr().out


def test_every_flag_has_a_help_text() -> None:
    for settings in (EngineConfig, LoRAConfig, MediaConfig, ServerConfig):
        assert all(field.description for field in settings.model_fields.values())
    assert build_parser().format_help()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1024", 1024),
        ("1B", 1),
        ("2KiB", 2048),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("4gib", 4 << 30),
        ("4GB", 4 * 10**9),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


class Report:
    rows: tuple[Any, ...] = ()

    def format(self) -> str:
        return "everything binds"


def test_adapter_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: dict[str, Any] = {
        "good": Report(),
        "bad": AdapterRejected("bad", ["DoRA is not served", "a bias is set"]),
        "gone": AdapterNotFound("there is no folder gone"),
    }

    def check_adapter(path: str, model: str, config: LoRAConfig) -> Any:
        assert (model, config.max_lora_rank) == ("m", 32)
        if isinstance(answers[path], Exception):
            raise answers[path]
        return answers[path]

    module = ModuleType("loramux.llm")
    module.check_adapter = check_adapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loramux.llm", module)
    codes = [
        main(["adapter", "check", path, "--model", "m", "--max-lora-rank", "32"])
        for path in ("good", "bad", "gone")
    ]
    assert codes == [0, 1, 2]
    out = capsys.readouterr().out
    assert "everything binds" in out and "DoRA is not served" in out and "a bias is set" in out


def test_bench_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("loramux.bench")
    module.main = lambda argv: len(argv)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loramux.bench", module)
    assert main(["bench", "--help", "x"]) == 2


def test_a_taken_port_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no/such/model", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_adapter_that_fails_aborts_the_start() -> None:
    engine = FakeEngine()
    listener = run.bind("127.0.0.1", 0)
    sources = [AdapterSource("new", "/no/such/folder")]
    with listener, pytest.raises(AdapterNotFound):
        run.serve_engine(engine, ServerConfig(), sources, listener)  # type: ignore[arg-type]
    assert engine.started and engine.stopping


def test_vllm_flags_that_ask_for_nothing_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    given = build_parser().parse_args(
        ["serve", "--enforce-eager", "--pipeline-parallel-size", "1", "--swap-space", "4", "model"]
    )
    assert given.model_positional == "model"
    assert main(["serve", "model", "--pipeline-parallel-size", "2", "--trust-remote-code"]) == 2
    error = capsys.readouterr().err
    assert "pipeline_parallel_size=2" in error and "trust_remote_code" in error
