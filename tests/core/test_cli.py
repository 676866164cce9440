from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

from trunkline.core import cli
from trunkline.core.discovery import Plugin
from trunkline.core.errors import ModelError
from trunkline.core.host import Host


def test_plugins_add_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plugin: Callable[..., Plugin]
) -> None:
    def commands(app: typer.Typer) -> None:
        @app.command()
        def shout(text: str) -> None:
            if text == "fail":
                raise ModelError("nothing to shout with")
            print(text.upper())

    monkeypatch.setattr(Host, "load", lambda only=None, without=(): Host([plugin("p", trunkline_commands=commands)]))
    assert cli.run(["shout", "hello"]) == 0
    assert capsys.readouterr().out == "HELLO\n"
    assert cli.run(["shout", "fail"]) == 1
    assert capsys.readouterr().err == "error: nothing to shout with\n"
    assert cli.run(["shout"]) == 2


def test_unknown_plugin_names_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--plugin", "generatoin"]) == 2
    assert "no plugin 'generatoin'" in capsys.readouterr().err
    assert cli.run(["plugins", "inspect", "nothing"]) == 2


def test_the_installed_plugins_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plugins", "list"]) == 0
    out = capsys.readouterr().out
    assert "models" in out
    assert "trunkline" in out


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["plan", "--help"], ["plugins", "list"]])
def test_looking_around_imports_nothing_heavy(args: list[str]) -> None:
    heavy = ("torch", "transformers", "litestar", "triton", "numba", "uvicorn", "huggingface_hub")
    script = (
        f"import sys; from trunkline.core.cli import run; run({args}); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
