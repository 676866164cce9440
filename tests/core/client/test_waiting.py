"""How much may wait, for which model, and who gives way to whom."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.core.client.replies import EngineReply
from trunkline.core.client.waiting import FALLBACK_POOL, QUEUE_POOLS, QueueLimits, displaced
from trunkline.core.errors import QueueFull, RequestError
from trunkline.core.settings import ServerSettings
from trunkline.core.types import ModelInfo, ServedModel, Submission

keys = itertools.count()


def served(causal: bool = True) -> ServedModel:
    info = ModelInfo(
        path="", architecture="A", model_type="a", context_length=64, vocab_size=9, hidden_size=4, causal=causal
    )
    names = dict.fromkeys(("name", "model_path", "tokenizer_path", "dtype", "attention_backend"), "m")
    return ServedModel(info=info, tasks={}, max_total_tokens=64, max_running_requests=1, **names)


def items(count: int, tokens: int = 1, priority: int = 0) -> list[Submission]:
    return [Submission(prompt=[1] * tokens, params=None, rid="", priority=priority) for _ in range(count)]


def submit(room: QueueLimits, model: str, count: int, *, tokens: int = 1, priority: int = 0) -> list[EngineReply]:
    """As the engine client does; the replies."""
    batch = items(count, tokens, priority)
    for reply in room.make_room(served(), model, batch):
        room.leave(reply)
        reply.fail(displaced())
    replies = [EngineReply(next(keys), model, "t", "r", tokens, lambda reply: None) for _ in batch]
    room.enter(replies, priority)
    return replies


def ended(*batches: list[EngineReply]) -> list[bool]:
    """Of each batch: was it displaced? All of a batch, or nothing."""
    states = [{reply.ended for reply in batch} for batch in batches]
    assert all(len(state) == 1 for state in states)
    return [state == {True} for state in states]


@pytest.mark.parametrize(("causal", "limit"), [(True, QUEUE_POOLS * 64), (False, QUEUE_POOLS * FALLBACK_POOL)])
def test_the_tokens_of_one_pass_are_no_pool(causal: bool, limit: int) -> None:
    room = QueueLimits(ServerSettings())
    room.make_room(served(causal), "m", items(1, limit))
    with pytest.raises(RequestError, match=rf"the limit is {limit} \(--max-queued-tokens\)"):
        room.make_room(served(causal), "m", items(1, limit + 1))


@pytest.mark.field
def test_a_full_queue_of_one_model_leaves_room_for_another() -> None:
    room = QueueLimits(ServerSettings(max_queued_tokens=10_000))
    submit(room, "a", 1024)
    submit(room, "a", 1024)
    with pytest.raises(QueueFull):
        submit(room, "a", 256)
    submit(room, "b", 1024)
    with pytest.raises(QueueFull):
        submit(room, "a", 1)


@pytest.mark.field
def test_all_models_together_have_a_limit() -> None:
    room = QueueLimits(ServerSettings(max_queued_requests=6, max_queued_requests_all_models=10))
    first, second = submit(room, "a", 6), submit(room, "b", 4)
    with pytest.raises(QueueFull):
        submit(room, "c", 1)
    with pytest.raises(RequestError, match=r"limit is 10 \(--max-queued-requests-all-models\)"):
        QueueLimits(ServerSettings(max_queued_requests_all_models=10)).make_room(None, "a", items(11))
    submit(room, "c", 1, priority=1)
    assert ended(first, second) == [False, True]  # the latest


@pytest.mark.field
def test_the_lowest_priority_gives_way_then_the_latest() -> None:
    room = QueueLimits(ServerSettings(max_queued_requests=6))
    high, low, early, late = (submit(room, "a", count, priority=p) for count, p in ((1, 5), (1, -2), (2, 0), (2, 0)))
    with pytest.raises(QueueFull):
        submit(room, "a", 1, priority=-2)
    submit(room, "a", 1, priority=3)
    assert ended(high, low, early, late) == [False, True, False, False]
    submit(room, "a", 1, priority=3)
    assert ended(high, early, late) == [False, False, True]


@pytest.mark.field
def test_a_batch_is_displaced_whole_its_running_part_too() -> None:
    room = QueueLimits(ServerSettings(max_queued_requests=4))
    batch = submit(room, "a", 4)
    room.leave(batch[0])  # it started
    submit(room, "a", 2, priority=1)
    assert ended(batch) == [True]
    assert str(batch[0].error) == "The request is aborted by a higher priority request."
    assert (batch[0].error.status, batch[0].error.retry_after) == (503, 1.0)  # type: ignore[union-attr]


@pytest.mark.field
def test_nobody_gives_way_in_vain() -> None:
    room = QueueLimits(ServerSettings(max_queued_requests=4))
    high, low = submit(room, "a", 3, priority=9), submit(room, "a", 1)
    with pytest.raises(QueueFull):
        submit(room, "a", 2, priority=5)
    assert ended(high, low) == [False, False]


@pytest.mark.field
def test_other_models_give_way_only_to_the_limit_of_all() -> None:
    room = QueueLimits(ServerSettings(max_queued_requests=4, max_queued_requests_all_models=100))
    other, own, same = submit(room, "b", 4, priority=-9), submit(room, "a", 1), submit(room, "a", 3, priority=7)
    submit(room, "a", 1, priority=7)
    assert ended(other, own, same) == [False, True, False]


@pytest.mark.field
def test_tokens_make_room_too() -> None:
    room = QueueLimits(ServerSettings(max_queued_tokens=100))
    small, large = submit(room, "a", 1, tokens=10), submit(room, "a", 1, tokens=80)
    submit(room, "a", 1, tokens=50, priority=1)
    assert ended(small, large) == [False, True]


@pytest.mark.field
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 30)),
        max_size=60,
    )
)
def test_the_limits_hold_whatever_comes_and_goes(steps: list[tuple[str, int, int, int, int]]) -> None:
    limits = ServerSettings(max_queued_requests=8, max_queued_tokens=40, max_queued_requests_all_models=14)
    room = QueueLimits(limits)
    for model, count, tokens, priority, leaves in steps:
        waiting: list[Any] = list(room.replies.values())
        before = {reply.key for reply in waiting}
        try:
            submit(room, model, count, tokens=tokens, priority=priority)
        except QueueFull:
            assert {reply.key for reply in room.replies.values()} == before
        for reply in list(room.replies.values())[:leaves]:
            room.leave(reply)
        now = list(room.replies.values())
        assert len(now) <= limits.max_queued_requests_all_models
        for name in "abc":
            own = [reply for reply in now if reply.model == name]
            assert len(own) <= limits.max_queued_requests
            assert sum(reply.prompt_tokens for reply in own) <= 40
    for reply in list(room.replies.values()):
        room.leave(reply)
    assert room.make_room(None, "a", items(8)) == []
