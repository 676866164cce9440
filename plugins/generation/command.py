"""``trunkline chat``: talk to a running server from the terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Generator
from contextlib import suppress
from typing import Annotated

import typer

from .conversation import ChatError, Conversation, Delta
from .terminal import AnswerWriter, read_message

HELP = r'''Commands:
  /system TEXT  set the system message; without TEXT there is none
  /regen        answer the last message again
  /clear        start a new conversation; the system message stays
  /help         this list
  /exit         leave (also Ctrl-D)
A line that ends with \ continues on the next one; lines between two lines of """ are one message.
Ctrl-C stops an answer.'''
HINT = "/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves."


class Leave(Exception):
    """The user wants to leave."""


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
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end the program
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
        conversation = Conversation(client, system=system, options=options)
        failed = _interactive(conversation) if sys.stdin.isatty() else _piped(conversation)
    raise typer.Exit(1 if failed else 0)


def _interactive(conversation: Conversation) -> bool:
    """Read messages from the terminal until the user leaves. Returns False: errors are shown and end nothing."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    typer.echo(HINT, err=True)
    while True:
        try:
            handle(conversation, read_message(input))
        except KeyboardInterrupt:  # at the prompt: what was typed is dropped
            typer.echo(err=True)
        except Leave:
            return False
        except EOFError:
            typer.echo(err=True)
            return False


def _piped(conversation: Conversation) -> bool:
    """Read messages from stdin until its end or the first failure. True if there was one."""
    with suppress(Leave, EOFError):
        while not handle(conversation, read_message(_read_line)):
            pass
        return True
    return False


def _read_line(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def handle(conversation: Conversation, text: str) -> bool:
    """Run a command, or send a message and write the answer to stdout. True if it failed; the reason is on stderr.

    Leave for /exit. A text that begins with ``/`` is a message unless its first word is a command, or its only word
    could be one.
    """
    if not text:
        return False
    command, _, argument = text.partition(" ")
    if command == "/exit":
        raise Leave
    if command == "/regen":
        return _show(conversation.regenerate())
    if command == "/clear":
        conversation.clear()
    elif command == "/system":
        conversation.system = argument.strip() or None
    elif command == "/help":
        typer.echo(HELP, err=True)
    elif re.fullmatch("/[a-z]+", text):
        typer.echo(f"There is no command {text}; /help lists them.", err=True)
        return True
    else:
        return _show(conversation.send(text))
    return False


def _show(answer: Generator[Delta]) -> bool:
    """Write an answer to stdout. True if it failed; the reason is on stderr."""
    writer = AnswerWriter(sys.stdout)
    failure: ChatError | None = None
    try:
        for delta in answer:
            writer.write(delta)
    except ChatError as error:
        failure = error
    except KeyboardInterrupt:
        answer.close()  # closes the connection, so that the server aborts the request
    if writer.began or failure is None:
        writer.end()
    if failure is not None:
        typer.echo(str(failure), err=True)
    return failure is not None
