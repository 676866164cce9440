"""Servers that tests share: which call gets which, and when one is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Stub:
    """A server that starts at once; ``process.poll()`` is an exit status, None while it lives."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.status: int | None = None
        self.process = SimpleNamespace(poll=lambda: self.status)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.status = -9


@pytest.fixture
def shared(live_server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(live_server, "LiveServer", Stub)
    return live_server.SharedServers(lambda: Path("log"))


def test_the_same_call_gets_the_same_server(shared: Any) -> None:
    first = shared("llama", "--flag")
    assert shared("llama", "--flag") is first
    assert shared("--flag", "llama") is not first, "options before models mean something else"
    assert shared("llama", "--flag", environment={"A": "1"}) is not first


def test_the_one_that_was_asked_for_longest_ago_is_closed(shared: Any, live_server: ModuleType) -> None:
    servers = [shared(str(index)) for index in range(live_server.MOST)]
    assert shared("0") is servers[0]
    shared("another")
    assert [server.status for server in servers] == [None, -9, *[None] * (live_server.MOST - 2)]
    assert shared("1") is not servers[1]


def test_a_server_that_has_ended_or_was_discarded_is_replaced(shared: Any) -> None:
    ended, discarded = shared("a"), shared("b")
    ended.status = 0
    shared.discard(discarded)
    assert discarded.status == -9
    assert shared("a") is not ended
    assert shared("b") is not discarded


def test_all_are_closed_in_the_end(shared: Any) -> None:
    servers = [shared("a"), shared("b")]
    shared.close()
    assert [server.status for server in servers] == [-9, -9]
