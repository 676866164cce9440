"""A request over which the engine died twice is not run a third time; those beside it are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from trunkline.core.client import suspects
from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.client.suspects import CrashSuspects
from trunkline.core.engine.messages import Call, Submit
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import Submission

pytestmark = pytest.mark.field

SHORT = WatchdogLimits(tick=0.05, crashes=100)


async def until_up(engine: Any) -> None:
    async with asyncio.timeout(30):
        while not engine.transport.up:
            await asyncio.sleep(0.01)


async def send(engine: Any, *items: Submission) -> list[Any]:
    """The error of each, None where there is none."""
    await until_up(engine)
    replies = [engine.submit("m", "echo", [item])[0] for item in items]
    return await asyncio.gather(*(reply.result() for reply in replies), return_exceptions=True)


def numbered(prompt: int, params: Any, rids: list[int] = [0], **fields: Any) -> Submission:  # noqa: B006
    """A submission with a new id."""
    rids[0] += 1
    return Submission(prompt=[prompt], params=params, rid=f"r{rids[0]}", **fields)


async def test_a_request_that_kills_the_engine_is_run_twice_and_no_more(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=SHORT)
    poison = params(fatal=0.0)
    (first,) = await send(engine, numbered(1, poison))
    assert isinstance(first, EngineDown)
    assert (first.status, first.retry_after is None) == (503, False)
    assert "may be sent again" in first.message
    (second,) = await send(engine, numbered(1, poison))
    assert (second.status, second.retry_after) == (500, None)
    assert "stopped twice while it worked on this request" in second.message
    await until_up(engine)
    restarts = engine.transport.restarts
    for _ in range(3):
        with pytest.raises(RequestError, match="stopped twice") as third:
            engine.submit("m", "echo", [numbered(1, poison)])
        assert third.value.status == 500
    assert await send(engine, numbered(2, params())) == [None]
    assert engine.transport.restarts == restarts == 2


async def test_the_requests_beside_it_get_through(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=SHORT)
    others = [numbered(prompt, params(n=20, delay=0.03)) for prompt in range(2, 6)]
    *beside, last = await send(engine, *others, numbered(1, params(fatal=0.2)))
    assert {type(error) for error in (*beside, last)} == {EngineDown}
    again = [numbered(item.prompt[0], item.params) for item in others]
    *beside, last = await send(engine, *again, numbered(1, params(fatal=0.2)))
    assert last.status == 500
    assert {None} >= {error for error in beside if not isinstance(error, EngineDown)}  # some may have ended before
    last = [numbered(item.prompt[0], item.params) for item in others]
    assert await send(engine, *last) == [None] * len(last)
    assert engine.transport.restarts == 2


async def test_suspects_run_alone_one_at_a_time_and_are_cleared_by_their_end(
    start: Callable[..., Any], params: Any
) -> None:
    engine = await start(limits=SHORT)
    slow = [numbered(prompt, params(n=8, delay=0.05)) for prompt in range(2, 5)]
    await send(engine, *slow, numbered(1, params(fatal=0.1)))
    await until_up(engine)
    replies = [engine.submit("m", "echo", [numbered(item.prompt[0], item.params)])[0] for item in slow]
    seen = []
    while not all(reply.ended for reply in replies):
        seen.append(len(await engine.call("alone")))
        await asyncio.sleep(0.01)
    assert set(seen) <= {0, 1}
    assert 1 in seen
    replies = [engine.submit("m", "echo", [numbered(item.prompt[0], item.params)])[0] for item in slow]
    while not all(reply.ended for reply in replies):
        assert await engine.call("alone") == []
        await asyncio.sleep(0.01)


async def test_a_suspect_that_waits_can_be_dropped(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=SHORT)
    slow = [numbered(prompt, params(n=20, delay=0.03)) for prompt in range(2, 5)]
    await send(engine, *slow, numbered(1, params(fatal=0.2)))
    await until_up(engine)
    replies = [engine.submit("m", "echo", [numbered(item.prompt[0], item.params)])[0] for item in slow]
    replies[1].cancel()
    replies[0].cancel()  # this one the engine has
    await asyncio.wait_for(replies[2].result(), 10)
    assert replies[2].finish["type"] == "length"


async def test_a_new_seed_does_not_make_it_another_request(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=SHORT)
    for seed, status in ((1, 503), (2, 500)):
        (error,) = await send(engine, numbered(1, params(fatal=0.0, seed=seed), volatile=("seed",)))
        assert error.status == status
    (error,) = await send(engine, numbered(1, params(fatal=0.0, seed=3)))  # a seed of the client's own
    assert error.status == 503


async def test_a_request_that_hangs_the_engine_counts_too(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=WatchdogLimits(tick=0.05, one_pass=5.0, crashes=100))
    for status in (503, 500):
        await until_up(engine)
        reply = engine.submit("m", "echo", [numbered(1, params(n=1000, delay=0.05))])[0]
        while not reply.tokens:
            await reply.wait()
        with pytest.raises(EngineDown):
            await engine.call("hang")
        with pytest.raises(RequestError) as caught:
            await reply.result()
        assert caught.value.status == status


async def test_a_client_that_has_left_is_remembered(start: Callable[..., Any], params: Any) -> None:
    """A request hangs the engine, its client gives up and sends it again: it was in the fatal pass all the same."""
    engine = await start(limits=SHORT)
    (reply,) = engine.submit("m", "echo", [numbered(1, params(fatal=0.5))])
    while not reply.started:
        await asyncio.sleep(0.01)
    reply.cancel()
    while engine.transport.up:
        await asyncio.sleep(0.01)
    (error,) = await send(engine, numbered(1, params(fatal=0.5)))
    assert error.status == 500


async def test_a_call_that_kills_the_engine_is_run_twice_and_no_more(start: Callable[..., Any]) -> None:
    engine = await start(limits=SHORT)
    for status in (503, 500):
        await until_up(engine)
        with pytest.raises(RequestError) as caught:
            await engine.call("die")
        assert caught.value.status == status
    await until_up(engine)
    with pytest.raises(RequestError, match="stopped twice"):
        engine.call("die")
    assert await engine.call("aborted") == 0


async def test_what_waits_when_the_engine_dies_is_no_suspect(start: Callable[..., Any], params: Any) -> None:
    engine = await start(limits=SHORT)
    for _ in range(3):
        error, _ = await send(
            engine, numbered(2, params(queue=60)), numbered(int(engine.transport.restarts), params(fatal=0.2))
        )
        assert isinstance(error, EngineDown)


# -- the table itself ------------------------------------------------------------------------


def submit(key: int, prompt: bytes = b"x", **params: Any) -> tuple[Submit, Submission]:
    raw = msgspec.Raw(msgspec.msgpack.encode(params))
    return Submit(key, "m", "t", f"r{key}", prompt, raw), Submission(prompt=[1], params=None, rid=f"r{key}")


def admit(table: CrashSuspects, *pairs: tuple[Submit, Submission]) -> list[Submit]:
    messages: Sequence[Submit] = [message for message, _ in pairs]
    return table.admit(messages, [item for _, item in pairs])


def died(table: CrashSuspects, keys: Sequence[int]) -> set[int]:
    """The only engine dies, so all requests end."""
    refused = table.engine_died(keys)
    table.clear()
    return refused


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MAX_REMEMBERED", 10)
    table = CrashSuspects()
    for number in range(100):
        admit(table, submit(number, prompt=number.to_bytes(4)))
        assert died(table, [number]) == set()
    assert len(table._deaths) == 10
    assert table._contents == {}
    assert table._queues.get("m", []) == []


def test_samples_of_one_prompt_count_once_and_all_get_their_turn() -> None:
    table = CrashSuspects()
    assert len(admit(table, submit(1), submit(2), submit(3))) == 3
    assert died(table, [1, 2, 3]) == set()
    assert [message.key for message in admit(table, submit(4), submit(5), submit(6))] == [4]
    assert [message.key for message in table.ended(4)] == [5]
    assert [message.key for message in table.ended(5)] == [6]
    assert table.ended(6) == []
    assert [message.alone for message in admit(table, submit(7))] == [False]


def test_an_abort_clears_nobody() -> None:
    table = CrashSuspects()
    admit(table, submit(1))
    died(table, [1])
    (message,) = admit(table, submit(2))
    assert message.alone
    table.ended(2, aborted=True)
    admit(table, submit(3))
    assert died(table, [3]) == {3}


def test_all_or_none_of_a_batch() -> None:
    table = CrashSuspects()
    for key in (1, 2):
        admit(table, submit(key))
        died(table, [key])
    with pytest.raises(RequestError, match="stopped twice"):
        admit(table, submit(3, prompt=b"y"), submit(4))
    assert table._contents == {}
    table.admit_call(Call(5, "look", "m", {}))
    assert died(table, [5, 99]) == set()


def test_other_params_are_another_request() -> None:
    table = CrashSuspects()
    for key in (1, 2):
        admit(table, submit(key, top_k=0))
        died(table, [key])
    assert len(admit(table, submit(3, top_k=1))) == 1


def test_other_embeddings_are_another_request() -> None:
    table = CrashSuspects()

    def of(key: int, embeds: bytes) -> tuple[Submit, Submission]:
        message, item = submit(key)
        message.embeds = embeds
        return message, item

    for key in (1, 2):
        admit(table, of(key, b"1234"))
        died(table, [key])
    assert len(admit(table, of(3, b"4321"))) == 1
    with pytest.raises(RequestError, match="stopped twice"):
        admit(table, of(4, b"1234"))
