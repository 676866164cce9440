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

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer."


class ChatFailed(Exception):
    """The server can't be reached or refused; the message is for the user."""


class Conversation:
    """A chat with its history, over HTTP."""

    def __init__(self, client: httpx.Client, *, system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self._options = options
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def say(self, text: str) -> Generator[str]:
        """Pieces of the answer. What arrived stays in the history, also when it was cut short."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for piece in self._stream({"messages": asked, "stream": True, **self._options}):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        import httpx

        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatFailed(_refusal(response.status_code, response.read()))
                yield from _pieces(response.iter_lines())
        except httpx.ConnectError as error:
            raise ChatFailed(f"No server at {self._client.base_url}; start one with `trunkline serve`.") from error
        except httpx.HTTPError as error:
            raise ChatFailed(f"The connection to {self._client.base_url} broke: {error}") from error


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Text deltas of an OpenAI event stream."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ChatFailed(event["error"]["message"])
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                yield piece


def _refusal(status: int, body: bytes) -> str:
    """The message in any of the server's error shapes."""
    with suppress(ValueError):
        answer = json.loads(body)
        if isinstance(answer, dict):
            error = answer.get("error", answer)
            text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
            if text:
                return f"{text} (HTTP {status})"
    return f"The server answered HTTP {status}."


def chat(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:30000",
    model: Annotated[str | None, typer.Option(help="Served model name; default the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRUNKLINE_API_KEY", help="Key of a server that asks for one.")
    ] = None,
) -> None:
    """Talk to a running server. Piped in, every line is one message and answers go to stdout."""
    import httpx

    options = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {key: value for key, value in options.items() if value is not None}
    headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
    timeout = httpx.Timeout(10.0, read=None)  # a busy server may queue a request for long
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
        conversation = Conversation(client, system=system, options=given)
        failed = _interactive(conversation) if sys.stdin.isatty() else _piped(conversation)
    raise typer.Exit(1 if failed else 0)


def _interactive(conversation: Conversation) -> bool:
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
        _turn(conversation, line)


def _piped(conversation: Conversation) -> bool:
    """One turn a line; stops at the first failure, which it returns."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that aren't text are no reason to fall over
    for line in sys.stdin:
        if line.strip() == "/exit":
            return False
        if _turn(conversation, line.strip()):
            return True
    return False


def _turn(conversation: Conversation, line: str) -> bool:
    """Answer one line on stdout. True: it failed, and the reason stands on stderr."""
    if not line:
        return False
    if line == "/reset":
        conversation.reset()
        return False
    if line == "/help":
        typer.echo(HELP, err=True)
        return False
    answer = conversation.say(line)
    failure: ChatFailed | None = None
    began = False
    try:
        for piece in answer:
            began = True
            sys.stdout.write(_harmless(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    except ChatFailed as error:
        failure = error
    except KeyboardInterrupt:
        answer.close()  # hangs up, so that the server stops too
    if began or failure is None:
        sys.stdout.write("\n")
    if failure is not None:
        typer.echo(str(failure), err=True)
    return failure is not None


def _harmless(text: str) -> str:
    """Without control characters: what a model writes must not drive the terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
