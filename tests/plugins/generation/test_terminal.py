"""``trunkline chat`` on a pseudo terminal, with a server that answers as the test says."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

SECONDS = 60  # limit for a reaction of the program
SCRIPT = "from trunkline.core.cli import main; main()"
PROMPT = "> "
INTERRUPT, END_OF_FILE = "\x03", "\x04"


class Server(ThreadingHTTPServer):
    """Answers each message with "re: " and its text; a message "wait" gets the first part only. ``seen``: bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Any] = []
        self.gone = threading.Event()  # the client closed the connection before the answer's end


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        text = body["messages"][-1]["content"]
        self.delta("reasoning_content", "thinking")
        self.delta("content", "re: ")
        if text == "wait":
            self.connection.settimeout(SECONDS)
            if self.connection.recv(1) == b"":
                self.server.gone.set()
            return
        self.delta("content", f"{text}\x1b]0;title\x07")
        self.wfile.write(b"data: [DONE]\n\n")

    def delta(self, field: str, text: str) -> None:
        event = {"choices": [{"index": 0, "delta": {field: text}}]}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: Any) -> None: ...


class Terminal:
    """The program on a pseudo terminal."""

    def __init__(self, url: str, term: str) -> None:
        self._side, other = pty.openpty()
        command = [sys.executable, "-c", SCRIPT, "chat", "--url", url]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=os.environ | {"TERM": term}, start_new_session=True,
            preexec_fn=lambda: take_terminal(other),
        )  # fmt: skip
        os.close(other)
        self._text = ""

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def wait_for(self, words: str) -> str:
        """Everything that is shown up to ``words``, since the last call."""
        deadline = time.monotonic() + SECONDS
        while words not in self._text:
            assert self._read(deadline - time.monotonic()), f"{words!r} is missing in {self._text!r}"
        before, _, self._text = self._text.partition(words)
        return before + words

    def wait_until_idle(self) -> None:
        """Return when the program waits for input. CPython's readline misses a signal before it does."""
        program, deadline = psutil.Process(self.process.pid), time.monotonic() + SECONDS
        while program.status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def _read(self, seconds: float) -> bool:
        """Read what is shown; False when nothing is within that time."""
        ready, _, _ = select.select([self._side], [], [], max(0, seconds))
        if ready:
            self._text += os.read(self._side, 4096).decode()
        return bool(ready)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)
        os.close(self._side)


def take_terminal(side: int) -> None:
    """Make the terminal the controlling one of a new session, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(side, termios.TIOCSCTTY, 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def terminal(server: Server, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    one = Terminal(f"http://127.0.0.1:{server.server_port}", getattr(request, "param", "xterm"))
    one.wait_for(PROMPT)
    yield one
    one.close()


def sent(server: Server) -> list[str]:
    """The texts of the last request."""
    return [message["content"] for message in server.seen[-1]["messages"]]


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, server: Server) -> None:
    terminal.type("wait\n")
    terminal.wait_for("re: ")
    terminal.type(INTERRUPT)
    terminal.wait_for(PROMPT)
    assert server.gone.wait(SECONDS), "the connection is closed, so the server aborts the request"
    terminal.type("hello\n")
    terminal.wait_for("re: hello")
    assert sent(server) == ["wait", "re: ", "hello"]


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Terminal, server: Server) -> None:
    terminal.type("half of a mess")
    terminal.wait_for("mess")
    terminal.wait_until_idle()
    terminal.type(INTERRUPT)
    terminal.wait_for(PROMPT)
    terminal.type("whole\n")
    terminal.wait_for("re: whole")
    assert sent(server) == ["whole"]


def test_arrow_up_brings_earlier_lines_back(terminal: Terminal, server: Server) -> None:
    for text in ("first", "second"):
        terminal.type(f"{text}\n")
        terminal.wait_for(f"re: {text}")
        terminal.wait_for(PROMPT)
    terminal.type("\x1b[A\x1b[A again\n")
    terminal.wait_for("re: first again")
    assert sent(server)[-1] == "first again"


def test_several_lines_and_commands(terminal: Terminal, server: Server) -> None:
    terminal.type('"""\n')
    terminal.wait_for(". ")
    terminal.type('one\ntwo\n"""\n')
    terminal.wait_for("re: one\r\ntwo")
    terminal.wait_for(PROMPT)
    terminal.type("/system be kind\n")
    terminal.wait_for(PROMPT)
    terminal.type("/regen\n")
    terminal.wait_for("re: one\r\ntwo")
    assert sent(server) == ["be kind", "one\ntwo"]
    terminal.wait_for(PROMPT)
    terminal.type("/nonsense\n")
    terminal.wait_for("There is no command /nonsense")
    terminal.wait_for(PROMPT)
    terminal.type(END_OF_FILE)
    assert terminal.process.wait(SECONDS) == 0


def test_reasoning_is_dimmed_and_control_characters_are_removed(terminal: Terminal) -> None:
    terminal.type("hello\n")
    shown = terminal.wait_for("re: hello") + terminal.wait_for(PROMPT)
    assert "\x1b[2mthinking\x1b[0m\r\nre: hello]0;title\r\n" in shown


@pytest.mark.parametrize("terminal", ["dumb"], indirect=True)
def test_a_dumb_terminal_gets_no_escapes_with_the_answer(terminal: Terminal) -> None:
    terminal.type("hello\n")
    shown = terminal.wait_for("re: hello")
    assert re.search(r"thinking\r\nre: hello$", shown)
    assert "\x1b[2m" not in shown


def test_exit_ends_the_program(terminal: Terminal) -> None:
    terminal.type("/exit\n")
    assert terminal.process.wait(SECONDS) == 0
