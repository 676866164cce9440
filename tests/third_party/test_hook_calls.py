"""How often each hook is called in each process, at the start and at a weight update, as hookspecs.py says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from safetensors.torch import load_file, save

from trunkline.core import Engine, hookspecs
from trunkline.plugins.generation import hooks as generation_hooks

PLUGIN = """
import os
from pathlib import Path
from msgspec import Struct
from trunkline.core import hookspecs
from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Launched, Needs, RequestObserver, Serves, SettingsGroup, Stage, Step
from trunkline.plugins.generation import hooks

class Nothing(Struct, frozen=True):
    pass

class CountedStage(Stage):
    task, params, result = "counted", Nothing, Nothing

    def admit(self, request):
        return Needs()

    def launch(self, part, hidden):
        return Launched()

    def collect(self, part, tensors):
        return [Step(row.request, data=Nothing(), finish={"type": "stop"}) for row in part.rows if row.final]

    def probe(self):
        return [1], Nothing()

class Observer:
    active = False

ANSWERS = {
    "trunkline_settings": lambda: SettingsGroup("counted", Nothing),
    "trunkline_serves": lambda: Serves("counted", "default"),
    "trunkline_heads": list,
    "trunkline_transforms": list,
    "trunkline_stages": lambda: [CountedStage()],
    "trunkline_expert_observers": lambda: [Observer()],
    "trunkline_request_observers": lambda: [RequestObserver()],
    "trunkline_metrics": list,
    "trunkline_controls": dict,
    "trunkline_info": dict,
    "trunkline_routes": list,
    "trunkline_logits_processors": list,
    "trunkline_stop_conditions": list,
    "trunkline_grammar_engines": list,
}

def counted(name):
    answer = ANSWERS.get(name, lambda: None)

    def function():
        with Path(os.environ["COUNTED_CALLS"]).open("a") as file:
            file.write(f"{os.getpid()} {name}\\n")
        return answer()

    return hookimpl(function)

names = [name for module in (hookspecs, hooks) for name in vars(module) if name.startswith("trunkline_")]
globals().update({name: counted(name) for name in names})
"""

# Hook -> calls with one model and --enable-metrics, in the front and in the engine: at the start, at an update from
# disk, at an update from tensors.
CALLS = {
    "trunkline_hookspecs": (1, 1, 0, 0, 0, 0),
    "trunkline_settings": (1, 1, 0, 0, 0, 0),
    "trunkline_commands": (1, 0, 0, 0, 0, 0),
    "trunkline_resolve_model": (2, 1, 1, 1, 0, 0),
    "trunkline_tokenizer": (1, 1, 0, 0, 0, 0),
    "trunkline_weights": (0, 1, 0, 1, 0, 0),
    "trunkline_serves": (0, 1, 0, 1, 0, 0),
    "trunkline_heads": (0, 1, 0, 1, 0, 1),
    "trunkline_transforms": (0, 1, 0, 1, 0, 0),
    "trunkline_stages": (0, 1, 0, 1, 0, 1),
    "trunkline_expert_observers": (0, 1, 0, 0, 0, 0),
    "trunkline_request_observers": (1, 0, 0, 0, 0, 0),
    "trunkline_metrics": (1, 0, 0, 0, 0, 0),
    "trunkline_controls": (0, 1, 0, 0, 0, 0),
    "trunkline_info": (1, 0, 1, 0, 1, 0),
    "trunkline_routes": (1, 0, 0, 0, 0, 0),
    "trunkline_app_config": (1, 0, 0, 0, 0, 0),
    "trunkline_logits_processors": (0, 1, 0, 1, 0, 1),
    "trunkline_stop_conditions": (0, 1, 0, 1, 0, 1),
    "trunkline_grammar_engines": (0, 1, 0, 1, 0, 1),
}
# Called for a client, wherever it is.
CLIENT = ("trunkline_resolve_model", "trunkline_tokenizer", "trunkline_request_observers")


class Calls:
    """The calls of the installed plugin's hooks, by process, since the last look."""

    def __init__(self, log: Path) -> None:
        self._log = log
        log.touch()

    def since(self) -> dict[int, Counter[str]]:
        found: dict[int, Counter[str]] = {}
        for line in self._log.read_text().splitlines():
            process, hook = line.split()
            found.setdefault(int(process), Counter())[hook] += 1
        self._log.write_text("")
        return found


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of a plugin that is installed for this process and its children."""
    packages = tmp_path / "packages"
    info = packages / "counted-1.0.dist-info"
    info.mkdir(parents=True)
    (packages / "counted_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trunkline]\ncounted = counted_plugin\n")
    monkeypatch.setenv("COUNTED_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "counted_plugin", raising=False)
    return Calls(tmp_path / "calls")


@pytest.fixture
def model(zoo: Callable[[str], Path]) -> Path:
    """A mixture of experts, so that observers are asked for, too."""
    return zoo("qwen3-moe")


def changed(model: Path) -> bytes:
    """A safetensors file with one of the model's tensors, which is changed."""
    name, tensor = next(iter(load_file(model / "model.safetensors").items()))
    return save({name: tensor + 1})


def column(index: int) -> Counter[str]:
    return Counter({hook: counts[index] for hook, counts in CALLS.items() if counts[index]})


def test_the_table_is_what_the_hooks_say(load_script: Callable[[str], ModuleType]) -> None:
    generator = load_script("docs/generate.py")
    specified = {*vars(hookspecs), *vars(generation_hooks)}
    assert set(CALLS) == {name for name in specified if name.startswith("trunkline_")}
    for hook, (front, engine, *update) in CALLS.items():
        expected = {"Front": front, "Engine": engine, "Update": sum(update)}
        said = generator.when_called(hook)
        assert said.keys() == {where for where, count in expected.items() if count}, hook
        assert said.get("Update", "").startswith("from disk, ") == (update[:2] != update[2:]), hook


def test_both_processes_at_the_start_and_at_an_update(calls: Calls, model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    code = "from trunkline.core.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(model), "--dtype", "float32", "--port", str(port)]
    command.append("--enable-metrics")
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            while "ready to roll" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            start = calls.since()
            assert start.pop(server.pid) == column(0)
            assert list(start.values()) == [column(1)]
            body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}
            assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 200
            assert httpx.get(f"{url}/model_info").status_code == 200
            assert calls.since() == {}
            answer = httpx.post(f"{url}/update_weights_from_disk", json={"model_path": str(other)}, timeout=120)
            assert answer.json()["success"], answer.text
            assert httpx.get(f"{url}/model_info").json()["model_path"] == str(other)
            update = calls.since()
            assert update.pop(server.pid) == column(2)
            assert list(update.values()) == [column(3)]
            headers = {"content-type": "application/octet-stream"}
            sent = {"content": changed(model), "headers": headers, "timeout": 120}
            answer = httpx.post(f"{url}/update_weights_from_tensor", params={"weight_version": "sent"}, **sent)
            assert answer.json()["success"], answer.text
            assert httpx.get(f"{url}/model_info").json()["weight_version"] == "sent"
            update = calls.since()
            assert update.pop(server.pid) == column(4)
            assert list(update.values()) == [column(5)]
        finally:
            server.send_signal(signal.SIGTERM)


def test_an_engine_in_this_process(calls: Calls, model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    with Engine(str(model), dtype="float32", threads=1) as engine:
        assert calls.since() == {os.getpid(): column(1) + Counter(CLIENT)}
        assert engine.call("update_weights", model_path=str(other))["success"]
        assert calls.since() == {os.getpid(): column(3)}
        (tmp_path / "sent").write_bytes(changed(model))
        assert engine.call("update_weights_from_tensor", path=str(tmp_path / "sent"))["success"]
        assert calls.since() == {os.getpid(): column(5)}


def test_other_commands(calls: Calls) -> None:
    run = [sys.executable, "-c", "from trunkline.core.cli import main; main()", "plugins"]
    every = Counter(("trunkline_hookspecs", "trunkline_settings", "trunkline_commands"))
    subprocess.run([*run, "list"], check=True, capture_output=True)
    assert list(calls.since().values()) == [every]
    subprocess.run([*run, "inspect", "counted"], check=True, capture_output=True)
    inspected = Counter(("trunkline_settings", "trunkline_controls", "trunkline_routes"))
    assert list(calls.since().values()) == [every + inspected]
