"""The engine's end of the connection to the front. Threads read and write, so that the engine loop never blocks on it.

``SocketChannel`` exchanges frames over an inherited socket; ``LocalChannel`` connects both ends within one process.
Unsent Progress messages of one request are merged (up to the next weight update), so that a front that doesn't read
makes the queue no larger than the outputs of the live requests.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from .messages import MAX_FRAME, Answer, Heartbeat, Progress, Started, frames, front_decoder


class Channel(Protocol):
    """What the engine loop uses of a channel."""

    def receive(self, *, wait: bool) -> list[Any]: ...
    def send(self, messages: list[Any]) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class Unsent:
    """Messages that wait to be sent; consecutive Progress messages of one request are merged."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._open: dict[int, Progress] = {}  # key -> its last unsent Progress

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, message: Any) -> None:
        if isinstance(message, Progress):
            if self._merge(message):
                return
        elif not isinstance(message, Started | Heartbeat | Answer):
            self._open.clear()  # of changed models: later tokens are of other weights, and mustn't come before it
        self._items.append(message)

    def take(self) -> list[Any]:
        """Remove and return all of them."""
        items, self._items, self._open = self._items, [], {}
        return items

    def _merge(self, new: Progress) -> bool:
        """Merge ``new`` into the request's unsent Progress. False if it must be sent separately."""
        last = self._open.get(new.key)
        if last is None or last.last or last.data is not None:
            self._open[new.key] = new
            return False
        last.tokens.extend(new.tokens)
        last.data, last.finish, last.error = new.data, new.finish, new.error
        return True


class Outbox:
    """A queue of unsent messages between two threads."""

    def __init__(self) -> None:
        self._unsent = Unsent()
        self._ready = threading.Condition()
        self._closed = False

    def put(self, messages: list[Any]) -> None:
        with self._ready:
            for message in messages:
                self._unsent.add(message)
            self._ready.notify()

    def take(self) -> list[Any] | None:
        """Wait for messages and take all of them. None after ``close``, when the queue is empty."""
        with self._ready:
            while not self._unsent and not self._closed:
                self._ready.wait()
            return self._unsent.take() or None

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify()


class LocalChannel:
    """Both ends in one process: ``deliver`` is called with each batch of engine messages."""

    def __init__(self, deliver: Callable[[list[Any]], None]) -> None:
        self._inbox: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._outbox = Outbox()
        self._deliver = deliver
        self._writer = threading.Thread(target=self._write, name="trunkline-deliver", daemon=True)
        self._writer.start()

    def post(self, *messages: Any) -> None:
        """Called by the front: send messages to the engine, which gets them together. None closes the connection."""
        self._inbox.put(messages)

    def receive(self, *, wait: bool) -> list[Any]:
        """The messages that have arrived; with ``wait``, block until there is one, or :meth:`wake` is called.

        None: the front is gone.
        """
        messages: list[Any] = []
        try:
            messages += self._inbox.get(block=wait)
            while True:
                messages += self._inbox.get_nowait()
        except Empty:
            return messages

    def wake(self) -> None:
        """Make :meth:`receive` return, now or at its next call. May be called from any thread."""
        self._inbox.put(())

    def send(self, messages: list[Any]) -> None:
        """Queue messages to the front. Doesn't block."""
        self._outbox.put(messages)

    def close(self) -> None:
        """Send the unsent messages, then stop."""
        self._outbox.close()
        self._writer.join(timeout=5)

    def _write(self) -> None:
        try:
            while (messages := self._outbox.take()) is not None:
                self._deliver(messages)
        finally:
            self.post(None)  # messages can't be sent any more, so the engine must stop


class SocketChannel(LocalChannel):
    """The engine process's end of the socketpair."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        super().__init__(self._transmit)
        self._reader = threading.Thread(target=self._read, name="trunkline-read", daemon=True)
        self._reader.start()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):  # the peer may have closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(timeout=5)
        self._socket.close()

    def _transmit(self, messages: list[Any]) -> None:
        try:
            for frame in frames(messages):
                self._socket.sendall(frame)
        except OSError:
            self.post(None)  # the front is gone

    def _read(self) -> None:
        try:
            while (body := read_frame(self._socket)) is not None:
                self.post(*front_decoder.decode(body))
        finally:
            self.post(None)  # also after a frame that can't be decoded


def read_frame(sock: socket.socket) -> bytes | None:
    """The body of one frame. None when the peer has closed the socket or the length is invalid."""
    head = _read_exactly(sock, 4)
    if head is None:
        return None
    length = int.from_bytes(head, "little")
    return _read_exactly(sock, length) if length <= MAX_FRAME else None


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    buffer = bytearray()
    while len(buffer) < count:
        try:
            chunk = sock.recv(min(count - len(buffer), 1 << 20))
        except OSError:
            return None
        if not chunk:
            return None
        buffer += chunk
    return bytes(buffer)
