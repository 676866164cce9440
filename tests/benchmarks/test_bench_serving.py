"""The load generator against a server of ten lines, so that it can't rot unseen."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_serving.py"


class FakeServer:
    """Streams as many tokens as asked for, two in each frame after the first, in a few odd chunks."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.flushes = 0
        self.fail = False
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            path = head.split()[1]
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = await reader.readexactly(length)
            if path == b"/flush_cache":
                self.flushes += 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            elif self.fail:
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nnope")
            else:
                self.stream(json.loads(body), writer)
        writer.close()

    def stream(self, body: dict[str, dict[str, int]], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        prompt, wanted = len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        text = b""
        for count in [*range(1, wanted, 2), wanted]:
            meta = {"completion_tokens": count, "prompt_tokens": prompt, "cached_tokens": prompt // 2}
            text += b"data: " + json.dumps({"output_ids": [7] * count, "meta_info": meta}).encode() + b"\n\n"
        text += b"data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(text), 50):
            chunk = text[start : start + 50]
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        writer.write(b"0\r\n\r\n")


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server, loop, started = FakeServer(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listener:
            server.port = listener.sockets[0].getsockname()[1]
            started.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    started.wait()
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def bench(server: FakeServer) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), f"http://127.0.0.1:{server.port}", "--rounds", "1", "--scale", "0.05"]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120, check=False)


def test_one_line_for_each_scenario(fake: FakeServer) -> None:
    done = bench(fake)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:18].strip() for line in lines] == [
        "single 128→128",
        "32 × 128→128",
        "8 × 1024 prefill",
        "32 × shared 1024",
    ]
    assert all("cached 50%" in line or "cached 49%" in line for line in lines)
    assert "prompt tok/s" in lines[2]
    assert fake.flushes == 8  # before each run, the warm-up's included
    assert len(fake.bodies) == 2 * (1 + 32 + 8 + 32)
    shared = [body["input_ids"] for body in fake.bodies[-32:]]
    assert len({tuple(ids[:51]) for ids in shared}) == 1  # type: ignore[index]
    assert len({tuple(ids) for ids in shared}) == 32  # type: ignore[arg-type]


def test_a_refusal_ends_the_run_with_the_server_s_words(fake: FakeServer) -> None:
    fake.fail = True
    done = bench(fake)
    assert done.returncode != 0
    assert "/generate answered 400: nope" in done.stderr
