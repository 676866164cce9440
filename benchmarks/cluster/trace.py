"""Recorded traffic, in the format of Mooncake's traces: a JSON object per line, for each request.

``timestamp`` in milliseconds, ``input_length`` and ``output_length`` in tokens, and ``hash_ids``: a number for each
block of the prompt, the last one perhaps shorter. Prompts that begin with the same blocks have the same first numbers.
So a trace has neither text nor tokens. Blocks are of 512 tokens in Mooncake's traces, and of :data:`BLOCK` in ours.

A replay sends a request at its time, whatever has become of those before. A prompt that repeats an earlier answer finds
it in no cache, since a trace doesn't tell answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from cluster.traffic import VOCABULARY, Ids, Job, Session

BLOCK = 32


class TraceRequest(Struct):
    """One line. Other fields are ignored."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, *, block: int, speed: float, longest: int) -> list[Session]:
    """A session for each request, in order of arrival, the first one at 0 s; times are divided by ``speed``.

    A prompt is cut so that it has at most ``longest`` tokens with its output. ValueError names a line whose blocks
    aren't of ``block`` tokens, or whose output alone is too long.
    """
    found = [(number, decode(line)) for number, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    first = min((request.timestamp for _, request in found), default=0.0)
    sessions = []
    for number, request in found:
        if len(request.hash_ids) != -(-request.input_length // block):
            raise ValueError(
                f"{path}:{number}: {len(request.hash_ids)} blocks for {request.input_length} tokens aren't blocks of "
                f"{block} tokens; give --trace-block."
            )
        output = max(1, request.output_length)
        if output >= longest:
            raise ValueError(f"{path}:{number}: the output has {output} tokens; give a --longest above that.")
        prompt = prompt_of(request.hash_ids, block)[: min(request.input_length, longest - output)]
        at = (request.timestamp - first) / 1e3 / speed
        sessions.append(Session(at, [Job(prompt, tokens_of(-number, output))]))
    return sorted(sessions, key=lambda session: session.at)


decode = msgspec.json.Decoder(TraceRequest).decode


def prompt_of(hash_ids: Sequence[int], block: int) -> Ids:
    """Whole blocks of random tokens, always the same ones for a number."""
    return np.concatenate([np.empty(0, np.int32), *(tokens_of(number, block) for number in hash_ids)])


@lru_cache(1 << 16)
def tokens_of(number: int, count: int) -> Ids:
    """Random tokens of a block, or for a negative number of an output."""
    return np.random.default_rng((number < 0, abs(number))).integers(1, VOCABULARY, count, dtype=np.int32)


class Blocks:
    """Numbers blocks of prompts in the order in which they are first seen."""

    def __init__(self, size: int = BLOCK) -> None:
        self._size = size
        self._numbers: dict[tuple[int, bytes], int] = {}  # by the block before, -1 for none, and the tokens

    def number(self, prompt: Sequence[int]) -> list[int]:
        """The ``hash_ids`` of a prompt: equal numbers mean equal prompts up to the end of that block."""
        ids, before, found = np.asarray(prompt, np.int32), -1, []
        for at in range(0, len(ids), self._size):
            before = self._numbers.setdefault((before, ids[at : at + self._size].tobytes()), len(self._numbers))
            found.append(before)
        return found


def trace_lines(requests: Iterable[tuple[float, Sequence[int], int]], size: int = BLOCK) -> Iterator[bytes]:
    """The lines of a trace, for the time in seconds, the prompt and the number of output tokens of each request."""
    blocks = Blocks(size)
    for seconds, prompt, output in requests:
        yield (
            msgspec.json.encode(TraceRequest(round(1e3 * seconds), len(prompt), output, blocks.number(prompt))) + b"\n"
        )
