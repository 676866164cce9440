"""The client against an engine process that speaks the frames."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.errors import EngineDown, QueueFull, RequestError
from trunkline.core.types import Submission

numbers = itertools.count()


def item(params: Any, prompt: list[int] | None = None, rid: str | None = None, priority: int = 0) -> Submission:
    return Submission(prompt=prompt or [5, 6, 7], params=params, rid=rid or f"r{next(numbers)}", priority=priority)


async def test_a_request_runs_to_its_end(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (reply,) = engine.submit("m", "echo", [item(params(n=4))])
    await reply.result()
    assert reply.tokens == [5, 6, 7, 5]
    assert reply.finish == {"type": "length", "length": 4}
    assert reply.data == {"step": 3}
    assert (reply.prompt_tokens, reply.cached_tokens) == (3, 2)
    assert reply.finished >= reply.created
    assert len(engine._live) == 0


async def test_wait_shows_progress_and_returns_at_once_when_over(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (reply,) = engine.submit("m", "echo", [item(params(n=5, delay=0.01))])
    seen = []
    while reply.finish is None:
        await reply.wait()
        seen.append(len(reply.tokens))
    assert seen == sorted(seen)
    assert seen[-1] == 5
    await asyncio.wait_for(reply.wait(), 1)
    await asyncio.wait_for(reply.wait(), 1)


async def test_begun_returns_when_a_request_runs_or_has_failed(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    runs, fails = engine.submit("m", "echo", [item(params(n=50, delay=0.05)), item(params(refuse=True))])
    async with asyncio.timeout(30):
        await runs.begun()
        await fails.begun()
    assert runs.started
    assert not runs.ended
    runs.cancel()
    with pytest.raises(RequestError, match="refused"):
        await fails.result()
    async with asyncio.timeout(30):
        await fails.begun()


async def test_many_requests_keep_apart(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    replies = engine.submit("m", "echo", [item(params(n=2), [i + 1, i + 2]) for i in range(50)])
    await asyncio.gather(*(reply.result() for reply in replies))
    assert [reply.tokens for reply in replies] == [[i + 1, i + 2] for i in range(50)]


async def test_an_error_of_the_engine_is_raised(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (reply,) = engine.submit("m", "echo", [item(params(refuse=True))])
    with pytest.raises(RequestError, match="refused") as caught:
        await reply.result()
    assert (caught.value.status, caught.value.param) == (400, "text")


async def test_abort_by_prefix_keeps_the_partial_output(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    slow = params(n=1000, delay=0.005)
    running, other = engine.submit("m", "echo", [item(slow, rid="x_0"), item(slow, rid="y")])
    (waiting,) = engine.submit("m", "echo", [item(params(queue=10), rid="x_1")])
    while not (running.tokens and other.tokens):
        await asyncio.sleep(0.01)
    assert engine.abort("nobody") == 0
    assert engine.abort("") == 0
    assert engine.abort("x") == 2
    await running.result()
    assert running.finish == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert running.tokens
    assert waiting.finish is not None
    assert waiting.finish["message"] == "Abort in waiting queue"
    assert other.finish is None
    assert engine.abort(everything=True) == 1
    assert len(engine._live) == 0
    assert await engine.call("aborted") == 3


async def test_cancel_frees_and_is_harmless_twice(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (reply,) = engine.submit("m", "echo", [item(params(n=1000, delay=0.005))])
    reply.cancel()
    reply.cancel()
    assert len(engine._live) == 0
    assert await engine.call("aborted") == 1


async def test_the_queue_is_bounded_by_requests(start: Callable[..., Any], params: Any) -> None:
    engine = await start(max_queued_requests=3)
    stuck = params(queue=10)
    engine.submit("m", "echo", [item(stuck), item(stuck)])
    with pytest.raises(QueueFull) as caught:
        engine.submit("m", "echo", [item(stuck), item(stuck)])
    assert caught.value.status == 503
    assert caught.value.retry_after
    assert len(engine._live) == 2  # all or none
    with pytest.raises(RequestError, match="limit is 3") as never:
        engine.submit("m", "echo", [item(stuck) for _ in range(4)])
    assert never.value.status == 400
    engine.submit("m", "echo", [item(stuck)])
    engine.abort(everything=True)
    engine.submit("m", "echo", [item(stuck) for _ in range(3)])


async def test_the_queue_is_bounded_by_tokens_of_the_pool(start: Callable[..., Any], params: Any) -> None:
    engine = await start({"model_path": "m", "max_total_tokens": 10})
    stuck = params(queue=10)
    engine.submit("m", "echo", [item(stuck, [1] * 100)])
    with pytest.raises(QueueFull):
        engine.submit("m", "echo", [item(stuck, [1] * 61)])
    with pytest.raises(RequestError, match="limit is 160"):
        engine.submit("m", "echo", [item(stuck, [1] * 161)])


@pytest.mark.field
async def test_a_full_queue_of_one_model_refuses_nothing_of_another(start: Callable[..., Any], params: Any) -> None:
    engine = await start({"model_path": "a"}, {"model_path": "b"}, max_queued_requests=3)
    engine.submit("a", "echo", [item(params(queue=10)) for _ in range(3)])
    with pytest.raises(QueueFull):
        engine.submit("a", "echo", [item(params())])
    (reply,) = engine.submit("b", "echo", [item(params(n=1))])
    await reply.result()


@pytest.mark.field
async def test_a_higher_priority_displaces_the_latest_batch_of_a_lower_one(
    start: Callable[..., Any], params: Any
) -> None:
    engine = await start(max_queued_requests=4)
    stuck = params(queue=10)
    early = engine.submit("m", "echo", [item(stuck), item(stuck)])
    late = engine.submit("m", "echo", [item(stuck), item(stuck)])
    (urgent,) = engine.submit("m", "echo", [item(params(n=1), priority=100)])
    await asyncio.wait_for(urgent.result(), 5)
    for reply in late:
        with pytest.raises(QueueFull, match="aborted by a higher priority request"):
            await reply.result()
    assert not any(reply.error for reply in early)
    assert len(engine._live) == 2
    assert await engine.call("aborted") == 2


async def test_started_requests_make_room_in_the_queue(start: Callable[..., Any], params: Any) -> None:
    engine = await start(max_queued_requests=1)
    for _ in range(5):
        (reply,) = engine.submit("m", "echo", [item(params(n=500, delay=0.01))])
        while not reply.tokens:
            await asyncio.sleep(0.005)
    assert len(engine._live) == 5


async def test_ids_that_do_not_fit_are_refused(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    with pytest.raises(RequestError, match="Token ids"):
        engine.submit("m", "echo", [item(params()), item(params(), [1 << 40])])
    assert len(engine._live) == 0


async def test_timeouts_end_requests(start: Callable[..., Any], params: Any) -> None:
    engine = await start(queue_timeout=0.2, request_timeout=0.6)
    (waiting,) = engine.submit("m", "echo", [item(params(queue=10))])
    (running,) = engine.submit("m", "echo", [item(params(n=10_000, delay=0.01))])
    with pytest.raises(RequestError, match=r"^Request waiting timeout reached\.$") as caught:
        await waiting.result()
    assert caught.value.status == 503
    with pytest.raises(RequestError, match=r"^Request running timeout reached\.$"):
        await running.result()
    assert running.tokens
    assert len(engine._live) == 0


async def test_controls_answer_or_raise(start: Callable[..., Any]) -> None:
    engine = await start()
    assert await engine.call("flush_cache", model="m") is True
    with pytest.raises(RequestError, match="no such control") as caught:
        await engine.call("dance")
    assert caught.value.status == 404


async def test_tokenizing_happens_elsewhere(start: Callable[..., Any]) -> None:
    engine = await start()
    assert await engine.tokenize("m", ["ab", "c"]) == [[1, 97, 98], [1, 99]]
    assert await engine.tokenize("m", ["ab"], special=False) == [[97, 98]]
    assert engine.tokenizer("m").decode([97]) == "a"


async def test_models_are_chosen_by_name_alias_or_task(start: Callable[..., Any]) -> None:
    one = await start()
    assert one.choose("echo", "default").name == "m"
    with pytest.raises(RequestError, match="can not sing"):
        one.choose("sing")
    with pytest.raises(RequestError, match="does not serve dance"):
        one.choose("dance", "m")
    several = await start({"model_path": "a"}, {"model_path": "b", "served_model_name": "bee"})
    assert several.choose("echo", "bee").name == "bee"
    assert several.choose("echo").name == several.choose("echo", "default").name == "a"
    with pytest.raises(RequestError, match="there are: a, bee") as caught:
        several.choose("echo", "cee")
    assert caught.value.code == "model_not_found"


async def test_each_request_leaves_one_line_without_text(
    start: Callable[..., Any], params: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start()
    with caplog.at_level(logging.INFO, "trunkline.request"):
        (reply,) = engine.submit("m", "echo", [item(params(n=2), rid="a b\nforged=1")])
        await reply.result()
    (line,) = [record.message for record in caplog.records if record.name == "trunkline.request"]
    assert line.startswith("rid=a?b?forged=1 model=m task=echo prompt=3 cached=2 output=2 queue_ms=")
    assert line.endswith("finish=length")


async def test_nothing_is_taken_while_the_engine_is_away(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    await engine.stop()
    with pytest.raises(EngineDown):
        engine.submit("m", "echo", [item(params())])
    with pytest.raises(EngineDown):
        await engine.call("probe")


async def test_an_id_means_one_live_request(start: Callable[..., Any], params: Any) -> None:
    engine = await start()
    (first,) = engine.submit("m", "echo", [item(params(queue=10), rid="x")])
    with pytest.raises(RequestError, match="Duplicate request ID detected: x"):
        engine.submit("m", "echo", [item(params(), rid="y"), item(params(), rid="x")])
    with pytest.raises(RequestError, match=r"within the request: \['z'\]"):
        engine.submit("m", "echo", [item(params(), rid="z"), item(params(), rid="z")])
    first.cancel()
    (again,) = engine.submit("m", "echo", [item(params(), rid="x")])
    await again.result()
    engine.submit("m", "echo", [item(params(), rid="x")])
