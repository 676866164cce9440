"""Serves models like ``trunkline``, and records the requests that reach the engine.

``python benchmarks/record_traffic.py FILE serve MODEL …`` writes a trace (benchmarks/cluster/trace.py) when the server
ends. It has times and lengths, and which prompts begin equally, but neither text nor tokens. Health probes aren't in
it, and salts of the prefix cache are ignored.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from cluster.trace import trace_lines

from trunkline.core import cli
from trunkline.core.client.client import Client
from trunkline.core.types import Reply, Submission


class Recorder:
    """The prompts that a client was given, and their replies. ``began``: by time.perf_counter()."""

    def __init__(self) -> None:
        self._requests: list[tuple[Sequence[int], Reply]] = []
        self.began = time.perf_counter()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what all clients in this process submit."""
        submit = Client.submit

        def recorded(client: Client[Any], model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
            replies = submit(client, model, task, items)
            pairs = zip(items, replies, strict=True)
            self._requests += [(item.prompt, reply) for item, reply in pairs if item.cacheable]
            return replies

        with mock.patch.object(Client, "submit", recorded):
            yield

    def write(self, path: Path) -> int:
        """Write those that have ended without an error; returns their number."""
        ended = [(prompt, reply) for prompt, reply in self._requests if reply.finish is not None]
        requests = [(reply.created - self.began, prompt, len(reply.tokens)) for prompt, reply in ended]
        path.write_bytes(b"".join(trace_lines(requests)))
        return len(ended)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    recorder, path = Recorder(), Path(sys.argv[1])
    with recorder.recording():
        status = cli.run(sys.argv[2:])
    print(f"{recorder.write(path)} requests are in {path}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
