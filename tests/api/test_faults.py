"""A server with a plugin that does everything wrong: exits, hangs, kills its process, returns nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.field, pytest.mark.faults]

METADATA = "Metadata-Version: 2.1\nName: faulty-dist\nVersion: 4.2\n"
ENTRY_POINTS = "[trunkline]\nfaulty = faulty_plugin\n"
PLUGIN = """
import ctypes, sys, time, uuid
from pathlib import Path
from litestar import Request, Response, post
from msgspec import Struct
from trunkline.core.hookspecs import hookimpl
from trunkline.core.server.api import wait_for_all, json_response, read_body, while_connected
from trunkline.core.types import Launched, Needs, Serves, Stage, Step, Submission

class Params(Struct):
    act: str = ""

class Result(Struct):
    done: bool = True

class FaultyStage(Stage):
    task, params, result = "faulty", Params, Result

    def admit(self, request):
        match request.params.act:
            case "exit in admit":
                sys.exit(3)
            case "wrong needs":
                return Needs(new_tokens="many")
        return Needs()

    def launch(self, part, hidden):
        for row in part.rows:
            act = row.request.params.act
            if act == "segfault":
                ctypes.string_at(0)
            if act.startswith("sleep "):
                time.sleep(float(act.split()[1]))
            if act == "exit in launch":
                raise KeyboardInterrupt
        return Launched()

    def collect(self, part, tensors):
        for row in part.rows:
            wrong = row.request.params.act == "wrong finish"
            if row.final:
                yield Step(row.request, data=Result(), finish="stop" if wrong else {"type": "stop"})

    def probe(self):
        return [1], Params()

@hookimpl
def trunkline_serves(model):
    return Serves("faulty", "default")

@hookimpl
def trunkline_stages(model, settings):
    return [FaultyStage()]

@hookimpl(tryfirst=True)
def trunkline_weights(source):
    if (Path(source.path) / "slow").exists():
        time.sleep(4)

@hookimpl
def trunkline_controls():
    return {"faulty_exit": lambda model: sys.exit(5)}

class Body(Struct):
    act: str = ""
    prompt: tuple[int, ...] = (1, 2, 3)

@hookimpl
def trunkline_routes(engine, settings):
    @post("/faulty", opt={"scope": "infer", "body": Body}, status_code=200)
    async def faulty(request: Request) -> Response:
        body = await read_body(request, Body)
        if body.act == "exit in route":
            sys.exit(4)
        if body.act == "exit in control":
            return json_response(await engine.call("faulty_exit"))
        item = Submission(prompt=list(body.prompt), params=Params(body.act), rid=uuid.uuid4().hex)
        replies = engine.submit(engine.models[0].name, "faulty", [item])
        await while_connected(request, wait_for_all(replies))
        return json_response(replies[0].data)
    return [faulty]
"""


@pytest.fixture(scope="module")
def faulty(
    live: Callable[..., Any], zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Any]]:
    """``faulty("--flag", …)``: a server of a tiny Llama on which the plugin is installed."""
    packages = tmp_path_factory.mktemp("packages")
    (packages / "faulty_plugin.py").write_text(PLUGIN)
    info = packages / "faulty_dist-4.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages))
        yield lambda *flags: live(str(zoo("llama")), "--served-model-name", "tiny", *flags)


@pytest.fixture(scope="module")
def server(faulty: Callable[..., Any]) -> Any:
    return faulty()


def act(server: Any, what: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/faulty", json={"act": what, **body}, timeout=120)


def restarts(server: Any) -> int:
    count: int = httpx.get(f"{server.url}/server_info").json()["internal_states"][0]["engine_restarts"]
    return count


def check_well(server: Any) -> None:
    """Both tasks are served, and nothing is held."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    assert len(answer.json()["output_ids"]) == 4
    assert act(server, "").json() == {"done": True}
    assert httpx.post(f"{server.url}/flush_cache", params={"timeout": 10}).status_code == 200


def wait_for_health(server: Any, status: int = 200, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while httpx.get(f"{server.url}/health").status_code != status:
        assert time.monotonic() < deadline, server.log.read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("exit in admit", "admit of task 'faulty' raised SystemExit: 3"),
        ("wrong needs", "admit of task 'faulty' returned Needs(new_tokens='many'"),
        ("exit in launch", "launch of task 'faulty' raised KeyboardInterrupt"),
        ("wrong finish", "collect of task 'faulty' gave a wrong step: finish"),
        ("exit in control", "the control 'faulty_exit' raised SystemExit: 5"),
        ("exit in route", "handler faulty raised SystemExit: 4"),
    ],
)
def test_the_request_fails_the_log_names_the_plugin_and_the_engine_goes_on(server: Any, what: str, words: str) -> None:
    before, pid = restarts(server), server.engine().pid
    assert act(server, what).status_code == 500
    check_well(server)
    assert (restarts(server), server.engine().pid) == (before, pid)
    assert f"plugin 'faulty' (faulty-dist 4.2): {words}" in server.log.read_text()


def test_a_task_that_keeps_failing_is_switched_off_and_can_be_enabled(server: Any) -> None:
    for _ in range(5):
        assert act(server, "exit in launch").status_code == 500
    off = act(server, "")
    assert off.status_code == 503
    assert "POST /plugins/faulty/enable" in off.text
    assert httpx.post(f"{server.url}/plugins/other/enable").status_code == 404
    assert httpx.post(f"{server.url}/plugins/faulty/enable").json() == {"plugin": "faulty", "tasks": ["faulty"]}
    check_well(server)


def test_a_prompt_that_kills_the_engine_is_run_twice_and_ends_no_server(server: Any) -> None:
    before = restarts(server)
    answers = []
    for _ in range(6):  # five crashes would end the server
        answers.append(act(server, "segfault"))
        wait_for_health(server)
    assert [answer.status_code for answer in answers] == [503, 500, 500, 500, 500, 500]
    assert "retry-after" in answers[0].headers
    assert all("retry-after" not in answer.headers and "stopped twice" in answer.text for answer in answers[1:])
    assert restarts(server) == before + 2
    check_well(server)


@pytest.fixture(scope="module")
def impatient(faulty: Callable[..., Any]) -> Any:
    """The watchdog waits for a second, and no pass comes before a client's."""
    return faulty("--watchdog-timeout", "1", "--skip-server-warmup")


def test_the_first_pass_after_a_start_and_after_a_restart_is_watched(impatient: Any) -> None:
    for number, status in enumerate((503, 500)):
        wait_for_health(impatient)
        answers: list[httpx.Response] = []
        began = time.monotonic()
        client = threading.Thread(target=lambda: answers.append(act(impatient, "sleep 60")))  # noqa: B023
        client.start()
        wait_for_health(impatient, 503)
        client.join()
        assert time.monotonic() - began < 30
        assert answers[0].status_code == status
        wait_for_health(impatient)
        assert restarts(impatient) == number + 1
    check_well(impatient)


def test_loading_weights_may_take_longer_than_a_pass(impatient: Any, other: Callable[[str], Path]) -> None:
    wait_for_health(impatient)
    before = restarts(impatient)
    (other("llama") / "slow").touch()
    try:
        answer = httpx.post(
            f"{impatient.url}/update_weights_from_disk", json={"model_path": str(other("llama"))}, timeout=120
        )
    finally:
        (other("llama") / "slow").unlink()
    assert answer.json()["success"], answer.text
    wait_for_health(impatient)
    assert restarts(impatient) == before
    assert act(impatient, "sleep 59").status_code == 503  # the next pass is watched again
