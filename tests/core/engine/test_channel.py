from __future__ import annotations

import socket
import threading

import msgspec

from trunkline.core.engine.channel import LocalChannel, Outbox, SocketChannel, read_frame
from trunkline.core.engine.messages import (
    Abort,
    Answer,
    Heartbeat,
    ModelsChanged,
    Progress,
    Stop,
    engine_decoder,
    frame,
)


def test_unsent_progress_of_one_request_is_one_message() -> None:
    box = Outbox()
    box.put([Progress(1, [5]), Progress(2, [7])])
    box.put([Progress(1, [6]), Heartbeat(age=0.0)])
    box.put([Progress(1, [8], finish={"type": "length"})])
    items = box.take()
    assert items is not None
    assert [(m.key, m.tokens) for m in items if isinstance(m, Progress)] == [(1, [5, 6, 8]), (2, [7])]
    assert items[0].finish == {"type": "length"}


def test_progress_with_data_is_never_lost_to_merging() -> None:
    box = Outbox()
    one, two = msgspec.Raw(b"\x01"), msgspec.Raw(b"\x02")
    box.put([Progress(1, [5], data=one), Progress(1, [6], data=two), Progress(1, [7])])
    items = box.take()
    assert items is not None
    assert [bytes(m.data) for m in items if m.data is not None] == [b"\x01", b"\x02"]


def test_tokens_of_new_weights_are_not_merged_into_those_of_old_ones() -> None:
    """Clients count which tokens came before the change."""
    box = Outbox()
    box.put([Progress(1, [5])])
    box.put([ModelsChanged([], [])])
    box.put([Progress(1, [6]), Progress(1, [7])])
    assert [getattr(m, "tokens", None) for m in box.take() or []] == [[5], None, [6, 7]]


def test_nothing_is_merged_into_a_finished_request() -> None:
    box = Outbox()
    box.put([Progress(1, [5], finish={"type": "stop"}), Progress(1, [9])])
    assert [m.tokens for m in box.take() or []] == [[5], [9]]


def test_taken_messages_are_not_touched_by_later_ones() -> None:
    box = Outbox()
    box.put([Progress(1, [5])])
    first = box.take()
    box.put([Progress(1, [6])])
    assert first is not None
    assert first[0].tokens == [5]
    assert [m.tokens for m in box.take() or []] == [[6]]


def test_closing_delivers_what_is_left() -> None:
    box = Outbox()
    box.put([Answer(1, "x")])
    box.close()
    assert box.take() is not None
    assert box.take() is None


def test_a_stalled_front_costs_one_message_a_request() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    channel = SocketChannel(ours)
    for step in range(20_000):  # nobody reads `theirs` meanwhile; send() must not block
        channel.send([Progress(key, [step]) for key in range(4)])
    assert len(channel._outbox._unsent._items) <= 4
    channel.send([Progress(key, [], finish={"type": "length"}) for key in range(4)])
    got: dict[int, list[int]] = {key: [] for key in range(4)}
    open_keys = set(got)
    while open_keys:
        body = read_frame(theirs)
        assert body is not None
        for message in engine_decoder.decode(body):
            assert isinstance(message, Progress)
            got[message.key] += message.tokens
            if message.finish:
                open_keys.discard(message.key)
    assert all(tokens == list(range(20_000)) for tokens in got.values())
    channel.close()
    theirs.close()


def test_the_engine_hears_when_the_front_hangs_up() -> None:
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours)
    theirs.sendall(frame([Abort(3), Stop()]))
    theirs.close()
    messages = []
    while None not in messages:
        messages += channel.receive(wait=True)
    assert messages == [Abort(3), Stop(), None]
    channel.close()


def test_receive_without_waiting_returns_at_once() -> None:
    seen = threading.Event()
    channel = LocalChannel(lambda messages: seen.set())
    assert channel.receive(wait=False) == []
    channel.send([Answer(1)])
    assert seen.wait(5)
    channel.close()
