"""A conversation with a running server, over ``/v1/chat/completions``; for ``trunkline chat``."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]


class ChatError(Exception):
    """The server can't be reached, or answered with an error; the message is shown to the user."""


class Delta(NamedTuple):
    """A part of an answer."""

    text: str
    reasoning: bool = False  # it is part of the reasoning before the answer


class Conversation:
    """The messages so far, and the options of each request. ``system``: the system message, None for none."""

    def __init__(self, client: httpx.Client, *, system: str | None, options: dict[str, Any]) -> None:
        self.system = system
        self._client = client
        self._options = options
        self._turns: list[Message] = []
        self._last: tuple[list[Message], str] | None = None  # the turns before the last message, and its text

    @property
    def messages(self) -> list[Message]:
        """All messages, the system message first."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self._turns]

    def clear(self) -> None:
        """Forget all messages but the system message."""
        self._turns, self._last = [], None

    def send(self, text: str) -> Generator[Delta]:
        """Send a message; yields the parts of the answer. ``messages`` gets both, also if the answer is cut.

        Without an answer, ``messages`` stays as it was. Reasoning is never sent back.
        """
        before = self._turns
        self._last = before, text
        message = {"role": "user", "content": text}
        answer = ""
        try:
            for delta in self._stream([*self.messages, message]):
                answer += "" if delta.reasoning else delta.text
                yield delta
        finally:
            if answer:
                self._turns = [*before, message, {"role": "assistant", "content": answer}]

    def regenerate(self) -> Generator[Delta]:
        """Send the last message again; a new answer replaces the last one. ChatError if there is no message."""
        if self._last is None:
            raise ChatError("There is no message to answer again.")
        turns = self._turns
        self._turns, text = self._last
        try:
            yield from self.send(text)
        finally:
            if self._turns is self._last[0]:  # there was no answer
                self._turns = turns

    def _stream(self, messages: list[Message]) -> Iterator[Delta]:
        import httpx

        body = {"messages": messages, "stream": True, **self._options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_error_message(response.status_code, response.read()))
                yield from _deltas(response.iter_lines())
        except httpx.ConnectError as error:
            raise ChatError(f"No server at {self._client.base_url}; start one with `trunkline serve`.") from error
        except httpx.HTTPError as error:
            raise ChatError(f"The connection to {self._client.base_url} broke: {error}") from error


def _deltas(lines: Iterable[str]) -> Iterator[Delta]:
    """The parts in an OpenAI event stream. ChatError if it has an error event."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            for field, reasoning in (("reasoning_content", True), ("content", False)):
                if text := choice["delta"].get(field):
                    yield Delta(text, reasoning)


def _error_message(status: int, body: bytes) -> str:
    """The message of an error response, in any of the server's error shapes."""
    with suppress(ValueError):
        answer = json.loads(body)
        if isinstance(answer, dict):
            error = answer.get("error", answer)
            text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
            if text:
                return f"{text} (HTTP {status})"
    return f"The server answered HTTP {status}."
