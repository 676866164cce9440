from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from trunkline.core import cli
from trunkline.core.commands.serve import read_selection, split
from trunkline.core.config import DEFAULT_MODEL, Config
from trunkline.core.discovery import Plugin
from trunkline.core.host import Host
from trunkline.core.settings import PluginSelection
from trunkline.core.types import SettingsGroup

Serve = Callable[..., Config]


class ShoutSettings(Struct, frozen=True):
    shout_level: Annotated[int, Meta(ge=1, le=3, description="How loud.")] = 1


class WhisperSettings(Struct, frozen=True):
    softness: Annotated[int, Meta(ge=1, description="How soft.")] = 1


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, plugin: Callable[..., Plugin]) -> Callable[..., tuple[int, Config | None]]:
    """``attempt("--port", "1")``: exit status of ``trunkline serve`` and the config that the server would get."""
    served: list[Config] = []
    server = ModuleType("trunkline.core.server.front")
    server.serve = lambda host, config: served.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, server.__name__, server)
    shout = plugin("shout", trunkline_settings=lambda: SettingsGroup("shout", ShoutSettings))
    whisper = plugin("whisper", trunkline_settings=lambda: SettingsGroup("whisper", WhisperSettings, per_model=True))
    monkeypatch.setattr(Host, "load", lambda only=None, without=(): Host([shout, whisper]))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def run(*args: str) -> tuple[int, Config | None]:
        served.clear()
        status = cli.run(["serve", *args])
        return status, served[0] if served else None

    return run


@pytest.fixture
def serve(attempt: Callable[..., tuple[int, Config | None]]) -> Serve:
    def run(*args: str) -> Config:
        status, config = attempt(*args)
        assert status == 0
        assert config is not None
        return config

    return run


def test_nothing_given_serves_the_demo(serve: Serve) -> None:
    config = serve()
    assert [model.model_path for model in config.models] == [DEFAULT_MODEL]


def test_flags_of_core_models_and_plugins(serve: Serve) -> None:
    config = serve("m", "--port", "1", "--shout-level=2", "--disable-radix-cache", "--chunked-prefill-size", "-1")
    assert config.server.port == 1
    assert config.settings["shout"].shout_level == 2
    assert config.models[0].disable_radix_cache
    assert config.models[0].chunked_prefill_size == -1


@pytest.mark.parametrize("model", [["m"], ["--model-path", "m"], ["--model", "m"], ["--model-path=m"], ["--", "m"]])
def test_ways_to_name_a_model(serve: Serve, model: list[str]) -> None:
    assert [one.model_path for one in serve("--dtype", "float32", *model).models] == ["m"]


def test_each_model_has_its_own_flags_and_the_first_ones_are_for_all(serve: Serve) -> None:
    config = serve(
        *("--dtype", "float32", "--context-length", "9"),
        *("a", "--context-length", "5"),
        *("--model-path", "b", "--served-model-name", "bee", "--port", "7"),
        *("c", "--task", "x,y", "--dtype", "bfloat16"),
    )
    assert [(m.name, m.dtype, m.context_length, m.task) for m in config.models] == [
        ("a", "float32", 5, None),
        ("bee", "float32", 9, None),
        ("c", "bfloat16", 9, ("x", "y")),
    ]
    assert config.server.port == 7


def test_settings_of_plugins_are_for_the_server_or_for_one_model(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[whisper]\nsoftness = 2\n[[models]]\nmodel_path = "b"\nsoftness = 4\n')

    def softness(*args: str) -> list[int]:
        return [model.plugins["whisper"].softness for model in serve(*args).models]

    assert softness("a", "--softness", "3", "b") == [3, 1]
    assert softness("--softness", "3", "a", "b", "--softness", "5") == [3, 5]
    assert softness("--config", str(file)) == [4]
    assert softness("--config", str(file), "a", "b") == [2, 4]
    assert softness("--config", str(file), "--softness", "3") == [3]
    assert serve("a", "--shout-level", "2", "b").settings["shout"].shout_level == 2


def test_the_file_is_weaker_than_flags(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[server]\nport = 1\nhost = "::"\n[[models]]\nmodel_path = "a"\n[plugins]\nwithout = ["x"]\n')
    config = serve("--config", str(file), "--port", "2")
    assert (config.server.port, config.server.host, config.models[0].name) == (2, "::", "a")
    assert config.plugins.without == ("x",)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prot", "3"], "--port"),
        (["--port", "x"], "--port"),
        (["--port", "70000"], "[server] port = 70000: Expected int <= 65535"),
        (["--dtype", "int3"], "--dtype"),
        (["--model-path"], "--model-path"),
        (["--tp", "2"], "--tp-size 2 isn't supported"),
        (["--quantization", "fp8"], "--quantization"),
        (["--config", "/no/such.toml"], "Can't read the configuration file"),
        (["a", "a"], "Two models are served as 'a'"),
        (["--served-model-name", "x", "a", "b"], "served as 'x'"),
        (["--enable-custom-logit-processor"], "--enable-custom-logit-processor isn't supported"),
    ],
)
def test_what_cannot_be_used_exits_with_2_and_a_sentence(
    attempt: Callable[..., tuple[int, Config | None]],
    capsys: pytest.CaptureFixture[str],
    args: Sequence[str],
    words: str,
) -> None:
    assert attempt(*args) == (2, None)
    assert words in capsys.readouterr().err


def test_flags_without_effect_are_accepted_with_a_log_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ignored = ("--tp", "1", "--log-requests", "--page-size", "1", "--schedule-conservativeness", "0.3")
    config = serve("m", *ignored, "--enable-memory-saver", "--skip-tokenizer-init")
    assert config.models[0].skip_tokenizer_init
    lines = [record.getMessage() for record in caplog.records if "accepted and ignored" in record.getMessage()]
    named = sorted(line.split()[0] for line in lines)
    assert named == [
        "--enable-memory-saver",
        "--log-requests",
        "--page-size",
        "--schedule-conservativeness",
        "--tp-size",
    ]


def test_help_shows_a_panel_a_group_and_hides_foreign_flags(
    attempt: Callable[..., tuple[int, Config | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt("--help") == (0, None)
    out = capsys.readouterr().out
    assert all(words in out for words in ("Server", "Engine", "Shout", "--shout-level", "--port", "[server]"))
    assert "--tp-size" not in out


# -- pieces ----------------------------------------------------------------------------------


def test_peek_reads_selection_and_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[plugins]\nonly = ["x"]\nwithout = ["y"]\n')
    assert read_selection(["m", "--plugin", "a", "--plugin=b,c", "--no-plugin", "d"]).plugins.only == ("a", "b", "c")
    assert read_selection(["--no-plugin", "d"]).plugins.without == ("d",)
    assert read_selection([f"--config={file}"]).plugins == PluginSelection(only=("x",), without=("y",))
    assert read_selection([f"--config={file}", "--plugin", "z"]).plugins == PluginSelection(only=("z",), without=("y",))


tokens = st.one_of(
    st.sampled_from(["--flag", "--dtype", "--dtype=x", "--model", "--model=m"]), st.text("ab-", min_size=1)
)


@given(st.lists(tokens))
def test_splitting_keeps_every_argument(args: list[str]) -> None:
    segments = split(args, {"--dtype", "--model"})
    together: list[Any] = [token for segment in segments for token in segment]
    positional = len(together) - len(args)
    assert positional >= 0
    for token in args:
        together.remove(token)
    assert together == ["--model-path"] * positional
    assert all(segment[0].startswith("--model") for segment in segments[1:])
