"""The whole HTTP process, over an engine process that is none: start, drain, crash loops, signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from trunkline.core.server.front import READY_MESSAGE

SERVER = """
import importlib.util, json, sys

spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = sys.modules["helpers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
from types import ModuleType
from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import TrunklineError
from trunkline.core.hookspecs import hookimpl
from trunkline.core.host import Host
from trunkline.core.logs import configure_logging
from trunkline.core.server.front import serve

configure_logging("INFO")
module = ModuleType("plugin_fake")
module.trunkline_resolve_model = hookimpl(lambda reference: helpers.ModelSource(reference, "/nowhere"))
module.trunkline_tokenizer = hookimpl(lambda source: helpers.Letters())
module.trunkline_routes = hookimpl(helpers.echo_routes)
host = Host([Plugin("fake", "plugin_fake", module=module)])
try:
    serve(host, Config.load(json.loads(sys.argv[2]), host), command=[sys.executable, sys.argv[3]])
except TrunklineError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""


class Server:
    """A server in a process of its own; ``out`` and ``err`` collect what it says."""

    def __init__(self, command: list[str], port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=lambda source=source, sink=sink: sink.extend(iter(source.readline, "")))
            for source, sink in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in (*self.out, *self.err)):
            assert self.process.poll() is None, "".join(self.err)
            assert time.monotonic() < deadline, "".join(self.err)
            time.sleep(0.02)

    def end(self, seconds: float = 60) -> int:
        """Wait for its exit; the status."""
        status = self.process.wait(seconds)
        for thread in self._threads:
            thread.join()
        return status

    def close(self) -> None:
        self.process.kill()
        self.end()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def launch(command: list[str], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``launch(model={...}, **server settings)``."""
    servers: list[Server] = []
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    helpers = Path(__file__).parents[1] / "conftest.py"

    def make(model: dict[str, Any] | None = None, **server: Any) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = server.setdefault("port", free.getsockname()[1])
        data = {"settings": {"server": server}, "models": [{"model_path": "m"} | (model or {})]}
        line = [sys.executable, str(script), str(helpers), json.dumps(data), command[-1]]
        servers.append(Server(line, port))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def in_background(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start ``function`` in a thread; the result joins it and returns what it returned."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def join() -> Any:
        thread.join()
        return results[0]

    return join


def test_it_starts_serves_drains_and_leaves_with_0(launch: Callable[..., Server]) -> None:
    server = launch()
    server.wait_for(READY_MESSAGE)
    panel = "".join(server.out)
    assert "echo (FakeForCausalLM" in panel
    assert "KV pool 2 KiB for 1000 tokens" in panel
    assert "/flush_cache" in panel
    assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer None"}).status_code == 200
    running = in_background(
        lambda: httpx.post(f"{server.url}/echo", json={"ids": [1], "n": 100, "delay": 0.02}, timeout=60)
    )
    server.wait_for("")
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert httpx.post(f"{server.url}/echo", json={"ids": [1]}).status_code == 503
    answer = running()
    assert answer.status_code == 200
    assert len(answer.json()[0]["ids"]) == 100
    assert server.end() == 0


def test_what_outlives_the_drain_is_answered_503(launch: Callable[..., Server]) -> None:
    server = launch(drain_timeout=0.5)
    server.wait_for(READY_MESSAGE)
    running = in_background(lambda: httpx.post(f"{server.url}/echo", json={"ids": [1], "queue": 60}, timeout=60))
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    assert running().status_code == 503
    assert server.end() == 0


def test_a_second_signal_hurries(launch: Callable[..., Server]) -> None:
    server = launch(drain_timeout=600)
    server.wait_for(READY_MESSAGE)
    running = in_background(lambda: httpx.post(f"{server.url}/echo", json={"ids": [1], "queue": 60}, timeout=60))
    time.sleep(0.5)
    server.process.send_signal(signal.SIGINT)
    server.wait_for("draining")
    server.process.send_signal(signal.SIGINT)
    assert running().status_code == 503
    assert server.end() == 0


def test_the_port_opens_when_the_engine_is_ready_and_not_before(launch: Callable[..., Server], tmp_path: Path) -> None:
    server = launch({"revision": "slow", "chat_template": str(tmp_path / "child.py")})
    server.wait_for("warming up")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_a_taken_port_is_known_before_a_model_is_loaded(launch: Callable[..., Server]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = launch(port=taken.getsockname()[1])
        assert server.end() == 1
    assert "Choose another with --port" in "".join(server.err)
    assert "warming up" not in "".join(server.err)


def test_a_model_that_can_not_be_loaded_ends_the_server(launch: Callable[..., Server]) -> None:
    server = launch({"revision": "fails"})
    assert server.end() == 1
    assert "error: The model is made of cheese." in "".join(server.err)


def test_a_crash_loop_ends_the_server_with_the_reason(launch: Callable[..., Server], tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("x")
    server = launch({"revision": "once", "chat_template": str(template)})
    server.wait_for(READY_MESSAGE)
    with httpx.Client() as http:
        running = in_background(lambda: httpx.post(f"{server.url}/echo", json={"ids": [1], "queue": 60}, timeout=60))
        time.sleep(0.5)
        assert http.post(f"{server.url}/die").status_code == 503
        assert running().status_code == 503
        assert http.get(f"{server.url}/health").status_code == 503
    assert server.end() == 1
    assert "failed 5 times" in "".join(server.err)


def test_a_killed_engine_comes_back_while_the_front_stays(launch: Callable[..., Server]) -> None:
    server = launch()
    server.wait_for(READY_MESSAGE)
    assert httpx.post(f"{server.url}/die").status_code == 503
    deadline = time.monotonic() + 30
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.post(f"{server.url}/echo", json={"ids": [1]}).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def test_the_front_leaves_torch_to_the_engine() -> None:
    """Its own modules and those of the installed plugins' routes: torch costs seconds and 200 MB."""
    script = """
import sys
from types import SimpleNamespace
from trunkline.core.config import Config
from trunkline.core.host import Host
from trunkline.core.server.front import prepare

prepare()
host = Host.load()
assert host.routes(SimpleNamespace(models=[]), Config.load({}, host).settings)
assert "litestar" in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.field
def test_a_newline_in_a_name_begins_no_line_of_the_output(launch: Callable[..., Server]) -> None:
    server = launch({"served_model_name": "m\nFORGED rid=1\x1b[31m"}, log_level="debug")
    server.wait_for(READY_MESSAGE)
    for path in ("/echo", "/FORGED%0aFORGED", "/update_weights_from_disk"):
        httpx.post(server.url + path, json={"ids": [1], "rid": "r\nFORGED", "model_path": "p\nFORGED"}, timeout=30)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    written = [*server.out, *server.err]
    assert any("Model" in line and "FORGED" in line for line in written)
    assert [line for line in written if line.lstrip("\u2502 ").startswith("FORGED") or "\x1b" in line] == []
