"""Request observers: what they are told, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.client.contracts import CheckedObservers, Failures
from trunkline.core.discovery import Plugin, Provided
from trunkline.core.errors import EngineDown, PluginError, RequestError
from trunkline.core.host import Host
from trunkline.core.types import Reply, RequestObserver, Submission

Event = tuple[Any, ...]


class Notes(RequestObserver):
    """Writes down what it is told, by request id."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}

    def submitted(self, reply: Reply) -> None:
        assert reply.created > reply.started == reply.first == reply.latest == reply.finished == 0
        self.events[reply.rid] = [("submitted", reply.model, reply.task, reply.prompt_tokens)]

    def started(self, reply: Reply) -> None:
        assert reply.started >= reply.created
        self.events[reply.rid].append(("started", reply.cached_tokens))

    def progressed(self, reply: Reply, tokens: int) -> None:
        before = sum(event[1] for event in self.events[reply.rid] if event[0] == "progressed")
        assert len(reply.tokens) == before, "the reply doesn't have the new tokens yet"
        assert (reply.latest > 0) == (before > 0)
        self.events[reply.rid].append(("progressed", tokens))

    def ended(self, reply: Reply) -> None:
        assert reply.finished >= max(reply.latest, reply.created)
        error = reply.error
        self.events[reply.rid].append(("ended", error.status if error else (reply.finish or {})["type"]))


class Faulty(RequestObserver):
    """Raises whatever is called, even what isn't an Exception."""

    def submitted(self, reply: Reply) -> None:
        raise SystemExit("leaving")

    def progressed(self, reply: Reply, tokens: int) -> None:
        raise ValueError("too many tokens")

    def ended(self, reply: Reply) -> None:
        raise asyncio.CancelledError


class Strict(RequestObserver):
    """Ends every request at its second message."""

    def __init__(self) -> None:
        self.ends = 0

    def progressed(self, reply: Reply, tokens: int) -> None:
        if reply.tokens:
            reply.cancel()

    def ended(self, reply: Reply) -> None:
        self.ends += 1


@pytest.fixture
def observe(host: Host, plugin: Callable[..., Plugin]) -> Callable[..., None]:
    """``observe(name=observer)``: load a plugin with this observer, as ``NAME-dist 1.0``."""

    def load(**observers: RequestObserver) -> None:
        found = [plugin(name, trunkline_request_observers=lambda one=one: [one]) for name, one in observers.items()]
        for one in found:
            one.distribution, one.version = f"{one.name}-dist", "1.0"
        host._load(found, required=observers)

    return load


def item(params: Any, rid: str, prompt: tuple[int, ...] = (5, 6, 7)) -> Submission:
    return Submission(prompt=list(prompt), params=params, rid=rid)


async def over(*replies: Any) -> None:
    for reply in replies:
        await asyncio.wait_for(asyncio.wait([asyncio.ensure_future(reply.result())]), 30)


async def test_every_end_of_a_request_in_order(
    start: Callable[..., Any], params: Any, observe: Callable[..., None]
) -> None:
    observe(notes=(notes := Notes()))
    engine = await start()
    plans = {
        "stop": params(n=2),
        "error": params(refuse=True),
        "abort": params(n=1000, delay=0.005),
        "waits": params(queue=60),
        "crash": params(n=1000, delay=0.005),
    }
    replies = dict(zip(plans, engine.submit("m", "echo", [item(plans[rid], rid) for rid in plans]), strict=True))
    while not all(replies[rid].tokens for rid in ("abort", "crash")):
        await asyncio.sleep(0.01)
    replies["abort"].cancel()
    replies["waits"].cancel()
    with pytest.raises(EngineDown):
        await engine.call("die")
    await over(*replies.values())
    assert {events[0] for events in notes.events.values()} == {("submitted", "m", "echo", 3)}
    names = {rid: [event[0] for event in events] for rid, events in notes.events.items()}
    progressed = {rid: len(replies[rid].tokens) for rid in ("abort", "crash")}
    assert names == {
        "stop": ["submitted", "started", "progressed", "progressed", "ended"],
        "error": ["submitted", "started", "ended"],
        "abort": ["submitted", "started", *["progressed"] * progressed["abort"], "ended"],
        "waits": ["submitted", "ended"],
        "crash": ["submitted", "started", *["progressed"] * progressed["crash"], "ended"],
    }
    ends = {rid: events[-1][1] for rid, events in notes.events.items()}
    assert ends == {"stop": "length", "error": 400, "abort": "abort", "waits": "abort", "crash": 503}
    assert notes.events["stop"][1:4] == [("started", 2), ("progressed", 1), ("progressed", 1)]


async def test_what_is_refused_at_submission_is_not_observed(
    start: Callable[..., Any], params: Any, observe: Callable[..., None]
) -> None:
    observe(notes=(notes := Notes()))
    engine = await start(max_queued_requests=1)
    with pytest.raises(RequestError, match="limit is 1"):
        engine.submit("m", "echo", [item(params(), "a"), item(params(), "b")])
    assert notes.events == {}


@pytest.mark.field
async def test_an_observer_that_raises_ends_no_request_and_is_named_once(
    start: Callable[..., Any], params: Any, observe: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    observe(bad=Faulty(), notes=(notes := Notes()))
    engine = await start(enable_metrics=True)
    replies = engine.submit("m", "echo", [item(params(n=3), rid) for rid in "ab"])
    await over(*replies)
    assert [reply.tokens for reply in replies] == [[5, 6, 7], [5, 6, 7]]
    assert [len(events) for events in notes.events.values()] == [6, 6], "the others are still told"
    raised = [record.getMessage() for record in caplog.records if "raised" in record.getMessage()]
    assert raised == [
        f"plugin 'bad' (bad-dist 1.0): Faulty.{what}; further failures of it are only counted"
        for what in (
            "submitted raised SystemExit: leaving",
            "progressed raised ValueError: too many tokens",
            "ended raised CancelledError",
        )
    ]
    text = engine.metrics.text().decode()
    for method, count in {"submitted": 2, "progressed": 6, "ended": 2}.items():
        assert f'trunkline:plugin_failures_total{{method="Faulty.{method}",plugin="bad"}} {count}.0' in text


async def test_an_observer_may_cancel_a_request(
    start: Callable[..., Any], params: Any, observe: Callable[..., None]
) -> None:
    observe(strict=(strict := Strict()))
    engine = await start()
    [long, short] = engine.submit("m", "echo", [item(params(n=500, delay=0.005), "a"), item(params(n=2), "b")])
    await over(long, short)
    assert [(reply.tokens, (reply.finish or {})["type"]) for reply in (long, short)] == [([5], "abort")] * 2
    assert strict.ends == 2
    assert len(engine._live) == 0


async def test_an_observer_that_is_none_stops_the_start_and_is_named(
    start: Callable[..., Any], observe: Callable[..., None]
) -> None:
    observe(odd=object())
    with pytest.raises(PluginError, match=r"'odd'.*object, not RequestObserver"):
        await start()


def provided(observer: RequestObserver) -> Provided[RequestObserver]:
    return Provided(Plugin("p", "p"), observer)


def test_only_what_an_observer_overrides_is_called() -> None:
    checked = CheckedObservers([provided(Strict()), provided(RequestObserver())], Failures())
    counts = [len(calls) for calls in (checked.submitted, checked.started, checked.progressed, checked.ended)]
    assert counts == [0, 0, 1, 1]


def test_a_coroutine_function_would_never_run() -> None:
    class Later(RequestObserver):
        async def ended(self, reply: Reply) -> None:  # type: ignore[override]
            pass

    with pytest.raises(PluginError, match=r"'p'.*Later\.ended must be a plain function, not async"):
        CheckedObservers([provided(Later())])
