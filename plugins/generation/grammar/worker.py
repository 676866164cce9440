"""A process that compiles grammars for trial: one that crashes it or takes too long does no harm to the engine.

``python -m trunkline.plugins.generation.grammar.worker`` reads frames from stdin and answers on stdout: a 4-byte
little-endian length and msgpack. The first one has the :class:`Vocabulary` and is answered with ``["ready"]``; each
other one is a :class:`Grammar`, answered with ``["ok", SOURCE]`` or ``["refused", REASON]``.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from trunkline.plugins.generation.schemas import Grammar

from .llguidance_source import Vocabulary, build_matcher, reason_of, source_of

CPU_SECONDS = 3
MEMORY = 1 << 30  # bytes that a compilation may allocate
HEAD = 4  # bytes of a frame's length


def read_frame(stream: BinaryIO) -> bytes | None:
    """The body of a frame; None at the end of the stream."""
    head = stream.read(HEAD)
    if len(head) < HEAD:
        return None
    size = int.from_bytes(head, "little")
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: BinaryIO, content: Any) -> None:
    body = msgspec.msgpack.encode(content)
    stream.write(len(body).to_bytes(HEAD, "little") + body)
    stream.flush()


def main() -> None:
    """Answer until stdin is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints mustn't reach the engine as an answer
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = read_frame(sys.stdin.buffer)
    if first is None:
        return
    vocabulary = msgspec.msgpack.decode(first, type=Vocabulary)
    tokenizer = vocabulary.load()
    limit_memory()
    write_frame(answers, ["ready"])
    decoder = msgspec.msgpack.Decoder(Grammar)
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        limit_time()
        try:
            answer = ["ok", try_out(decoder.decode(frame), tokenizer, vocabulary.size)]
        except (ValueError, RecursionError, MemoryError) as error:
            answer = ["refused", str(error) or type(error).__name__]
        write_frame(answers, answer)


def try_out(grammar: Grammar, tokenizer: Any, size: int) -> str:
    """Compile a grammar and compute its first mask. Returns its source for the engine. ValueError for the client."""
    source = source_of(grammar, tokenizer)
    matcher = build_matcher(tokenizer, source)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason_of(matcher))
    if not any(mask):
        raise ValueError("no text matches it")
    return source


def limit_memory() -> None:
    """Let allocations beyond ``MEMORY`` fail, which ends the process; only where its present size is known (Linux)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_time() -> None:
    """Let the kernel end the process ``CPU_SECONDS`` of CPU time from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
