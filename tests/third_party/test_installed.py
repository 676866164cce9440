"""A plugin from outside gets what the project's own get: discovery, flags, commands, routes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


def python(outside: Path, code: str) -> str:
    return subprocess.run([outside / "python", "-c", code], capture_output=True, text=True, check=True).stdout


def trunkline(outside: Path, *args: str) -> str:
    return python(outside, f"import sys; from trunkline.core.cli import run; sys.exit(run({list(args)}))")


def test_listed_beside_the_projects_own(outside: Path) -> None:
    lines = {line.split()[0]: line for line in trunkline(outside, "plugins", "list").splitlines()}
    assert "trunkline-surprise" in lines["surprise"]
    assert "0.1.0" in lines["surprise"]
    assert lines["no_digits"].split()[1] == "trunkline-no-digits"
    assert "models" in lines


def test_inspected_with_flags_routes_and_scopes(outside: Path) -> None:
    out = trunkline(outside, "plugins", "inspect", "surprise")
    assert "--surprise-max-tokens" in out
    assert [line.split() for line in out.splitlines() if "/surprise" in line][-1] == ["POST", "/surprise", "infer"]


def test_hooks_of_plugins_are_inspected_like_core_s(outside: Path) -> None:
    out = trunkline(outside, "plugins", "inspect", "no_digits")
    assert "logits_processors" in out
    assert "Objects that change the logits of requests before the next token is" in out
    assert "stop_conditions" in out
    assert "trunkline-no-digits 0.1.0" in out


def test_without_the_plugin_that_specifies_its_hooks_it_is_left_out(outside: Path) -> None:
    code = """
from trunkline.core.host import Host
print(Host.load(without=["generation"]).quarantined["no_digits"][1])
"""
    assert "there is no hook trunkline_logits_processors" in python(outside, code)


def test_its_flag_and_command_are_in_the_cli(outside: Path) -> None:
    assert "--surprise-max-tokens" in trunkline(outside, "serve", "--help")
    assert "--surprise-max-tokens" not in trunkline(outside, "serve", "--no-plugin", "surprise", "--help")
    assert "surprise" in trunkline(outside, "--help")


def test_its_settings_reach_the_engines_config(outside: Path) -> None:
    code = """
import json
from trunkline.core.config import Config
from trunkline.core.host import Host
host = Host.load()
config = Config.load({"settings": {"surprise": {"surprise_max_tokens": 7}}}, host)
print(json.dumps(Config.load(config.dump(), host).dump()["settings"]["surprise"]))
"""
    assert json.loads(python(outside, code)) == {"surprise_max_tokens": 7}


def test_its_own_tests_pass(outside: Path) -> None:
    """With the test kit, as docs/plugins.md shows."""
    tests = outside.parent.parent / "trunkline-surprise" / "test_surprise.py"
    options = ["-q", "-p", "trunkline.core.testing", "-p", "no:cacheprovider", "-c", "/dev/null", str(tests)]
    done = subprocess.run([outside / "python", "-m", "pytest", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
