"""``trunkline chat``: talk to a running server from the terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

HELP = "/reset starts a new conversation, /exit or Ctrl-D ends the program, Ctrl-C stops an answer."


class ChatError(Exception):
    """The server can't be reached, or answered with an error; the message is shown to the user."""


class Conversation:
    """A conversation with a server: its messages so far, and the options of each request."""

    def __init__(self, client: httpx.Client, *, system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._options = options
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def send(self, text: str) -> Generator[str]:
        """Send a message; yields the text deltas of the answer. ``messages`` gets both, also if the answer is cut."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for delta in self._stream({"messages": messages, "stream": True, **self._options}):
                answer += delta
                yield delta
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        import httpx

        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_error_message(response.status_code, response.read()))
                yield from _deltas(response.iter_lines())
        except httpx.ConnectError as error:
            raise ChatError(f"No server at {self._client.base_url}; start one with `trunkline serve`.") from error
        except httpx.HTTPError as error:
            raise ChatError(f"The connection to {self._client.base_url} broke: {error}") from error


def _deltas(lines: Iterable[str]) -> Iterator[str]:
    """Text deltas of an OpenAI event stream. ChatError if it has an error event."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            if delta := choice["delta"].get("content"):
                yield delta


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


def chat(
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:30000",
    model: Annotated[str | None, typer.Option(help="Name of the served model; default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit on the tokens of an answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy decoding; default: the model's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRUNKLINE_API_KEY", help="API key, if the server requires one.")
    ] = None,
) -> None:
    """Talk to a running server. If stdin is a pipe, each line is a message; answers go to stdout."""
    import httpx

    options = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options = {key: value for key, value in options.items() if value is not None}
    headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
    timeout = httpx.Timeout(10.0, read=None)  # a request may wait long in the queue of a busy server
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
        conversation = Conversation(client, system=system, options=options)
        failed = _interactive(conversation) if sys.stdin.isatty() else _piped(conversation)
    raise typer.Exit(1 if failed else 0)


def _interactive(conversation: Conversation) -> bool:
    """Read lines from the terminal until the user leaves. Returns False: errors are shown and end nothing."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return False
        if line == "/exit":
            return False
        _handle_line(conversation, line)


def _piped(conversation: Conversation) -> bool:
    """Read lines from stdin until its end or the first failure. True if there was one."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end the program
    for line in sys.stdin:
        if line.strip() == "/exit":
            return False
        if _handle_line(conversation, line.strip()):
            return True
    return False


def _handle_line(conversation: Conversation, line: str) -> bool:
    """Run a command, or send a message and write the answer to stdout. True if it failed; the reason is on stderr."""
    if not line:
        return False
    if line == "/reset":
        conversation.reset()
        return False
    if line == "/help":
        typer.echo(HELP, err=True)
        return False
    answer = conversation.send(line)
    failure: ChatError | None = None
    began = False
    try:
        for delta in answer:
            began = True
            sys.stdout.write(_printable(delta) if sys.stdout.isatty() else delta)
            sys.stdout.flush()
    except ChatError as error:
        failure = error
    except KeyboardInterrupt:
        answer.close()  # closes the connection, so that the server aborts the request
    if began or failure is None:
        sys.stdout.write("\n")
    if failure is not None:
        typer.echo(str(failure), err=True)
    return failure is not None


def _printable(text: str) -> str:
    """``text`` without control characters, so that the output of a model can't control the terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
