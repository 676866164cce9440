"""The engine process dies, hangs, falls silent, talks nonsense: it is replaced."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from trunkline.core.client.engine_process import KEEP, SPIN
from trunkline.core.client.supervisor import LoadingDisplay, WatchdogLimits
from trunkline.core.engine.messages import Loading
from trunkline.core.errors import EngineDown, ModelError
from trunkline.core.types import Submission

SHORT = WatchdogLimits(unhealthy=0.3, silent=1.0, one_pass=5.0, tick=0.05)


def engine_pid() -> int:
    """The process id of the running engine."""
    children = psutil.Process().children()
    [engine] = [child for child in children if any("fake_engine" in word for word in child.cmdline())]
    return engine.pid


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", ["die", "silent", "hang", "nonsense"])
async def test_a_lost_engine_is_replaced(start: Callable[..., Any], params: Any, fault: str) -> None:
    engine = await start(limits=SHORT)
    pid = engine_pid()
    (reply,) = engine.submit("m", "echo", [Submission(prompt=[1], params=params(queue=60), rid="r")])
    pending = engine.call(fault)
    with pytest.raises(EngineDown) as caught:
        await reply.result()
    assert caught.value.status == 503
    assert caught.value.retry_after
    with pytest.raises(EngineDown):
        await pending
    await until(lambda: engine.transport.healthy)
    assert engine_pid() != pid
    assert engine.transport.restarts == 1
    (again,) = engine.submit("m", "echo", [Submission(prompt=[1], params=params(), rid="r")])
    await again.result()


@pytest.mark.field
async def test_health_fails_before_an_old_pass_is_a_hang(start: Callable[..., Any]) -> None:
    engine = await start(limits=WatchdogLimits(one_pass=300.0, tick=0.05))
    for age, healthy in ((99.0, True), (101.0, False), (299.0, False), (0.0, True)):
        await engine.call("beat", age=age)
        await until(lambda: engine.transport.healthy is healthy)  # noqa: B023
    assert engine.transport.restarts == 0


@pytest.mark.field
async def test_work_that_takes_long_is_excused_until_it_ends_and_not_for_ever(start: Callable[..., Any]) -> None:
    engine = await start(limits=WatchdogLimits(one_pass=300.0, starting=1200.0, tick=0.05))
    await engine.call("beat", age=1199.0, work="loading a checkpoint")
    await asyncio.sleep(0.3)
    assert engine.transport.healthy
    await engine.call("beat", age=0.0)
    pending = engine.call("hang")  # the same pass goes on, without announcing anything
    with pytest.raises(EngineDown, match="one pass took longer than 300 s"):
        await pending
    await until(lambda: engine.transport.healthy)
    await engine.call("beat", age=1201.0, work="loading a checkpoint")
    await until(lambda: engine.transport.restarts == 2)


async def test_kill_is_noticed_at_once(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (reply,) = engine.submit("m", "echo", [Submission(prompt=[1], params=params(queue=60), rid="r")])
    os.kill(engine_pid(), signal.SIGKILL)
    with pytest.raises(EngineDown, match="it died"):
        await asyncio.wait_for(reply.result(), 5)
    assert not engine.transport.healthy


async def test_a_stopped_engine_is_unhealthy_then_recovers(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=WatchdogLimits(unhealthy=0.3, silent=60, tick=0.05))
    pid = engine_pid()
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: not engine.transport.healthy)
    os.kill(pid, signal.SIGCONT)
    await until(lambda: engine.transport.healthy)
    assert engine.transport.restarts == 0
    assert engine_pid() == pid


async def test_a_stopped_engine_is_replaced_in_the_end(start: Callable[..., Any]) -> None:
    engine = await start(limits=SHORT)
    os.kill(engine_pid(), signal.SIGSTOP)
    await until(lambda: engine.transport.restarts == 1)
    await until(lambda: engine.transport.healthy)


@pytest.mark.parametrize(("mode", "reason"), [("fails", "made of cheese"), ("dies", "exit status 3")])
async def test_a_first_start_that_fails_says_why(start: Callable[..., Any], mode: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        await start({"model_path": "m", "revision": mode})


async def test_a_crash_loop_ends_with_the_reason(start: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("x")
    model = {"model_path": "m", "revision": "once", "chat_template": str(template)}
    engine = await start(model, limits=WatchdogLimits(crashes=3, tick=0.05))
    os.kill(engine_pid(), signal.SIGKILL)
    reason = await asyncio.wait_for(engine.transport.ended, 30)
    assert "failed 3 times" in reason
    assert "exit status 4" in reason


async def test_stop_leaves_no_process(start: Callable[..., Any]) -> None:
    engine = await start()
    pid = engine_pid()
    await engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads another process's environment")
@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"MALLOC_TRIM_THRESHOLD_": "4096"}])
async def test_the_user_s_environment_wins(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("OMP_WAIT_POLICY", *SPIN, *KEEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    await start()
    lines = Path(f"/proc/{engine_pid()}/environ").read_bytes().decode().split("\0")
    seen = dict(line.split("=", 1) for line in lines if line)
    wanted = (KEEP if "OMP_WAIT_POLICY" in given else SPIN | KEEP) | given
    assert {name: value for name, value in seen.items() if name in SPIN | KEEP | given} == wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_of_a_phase_are_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    display = LoadingDisplay()
    for done in range(4):
        display.show(Loading("warming up m", done, 3))
    assert "warming up m" in terminal.getvalue()
    assert "2/3" in terminal.getvalue()
    assert display._bars is None


def test_steps_of_a_phase_are_one_line_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    display = LoadingDisplay()
    with caplog.at_level(logging.INFO, "trunkline.supervisor"):
        display.show(Loading("loading m"))
        for done in range(4):
            display.show(Loading("warming up m", done, 3))
    assert [record.message for record in caplog.records] == ["engine: loading m", "engine: warming up m"]
