"""A process in which grammars are compiled for trial: one that crashes or takes too long does no harm to the engine.

``python -m trunkline.plugins.generation.grammar.worker`` reads frames from stdin and answers on stdout: a 4-byte
little-endian length and msgpack. The first one has the :class:`Vocabulary` and is answered with an empty
:class:`Answer`; each other one is a :class:`Question`. Each grammar is compiled in a child process of its own.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from trunkline.plugins.generation.schemas import Grammar

from .llguidance_source import Vocabulary, build_matcher, failing_field, reason_of, source_of

MEMORY = 1 << 30  # bytes that a compilation may allocate
WAIT_SECONDS = 10.0  # of the clock, and 20 times the CPU time: other processes may have the cores
# Signals that say nothing about a grammar: the clock's limit above, and those of the system when memory is short, or
# of an operator.
OUTSIDE = (signal.SIGALRM, signal.SIGKILL, signal.SIGTERM)
HEAD = 4  # bytes of a frame's length


class Question(Struct):
    """A grammar, and the CPU time that its compilation may take."""

    grammar: Grammar
    seconds: float


class Answer(Struct, omit_defaults=True):
    """``source``: the grammar as the engine compiles it, which takes ``nbytes`` of memory, 0 if that isn't known.
    Otherwise the ``reason`` why it is refused, for the client, or the number of the ``signal`` that ended its process.
    """

    source: str = ""
    nbytes: int = 0
    reason: str = ""
    signal: int = 0


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
    try_out(Grammar("regex", "a"), tokenizer)  # so that it isn't charged with what all grammars have in common
    write_frame(answers, Answer())
    decoder = msgspec.msgpack.Decoder(Question)
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        write_frame(answers, try_in_child(decoder.decode(frame), tokenizer))


def try_in_child(question: Question, tokenizer: Any) -> Answer:
    """The answer of a child process, which has a copy of the tokenizer's memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            limit_memory()
            # Signals of these timers end the process. The second one is for a child that waits for something forever.
            signal.setitimer(signal.ITIMER_PROF, question.seconds)
            signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS + 20 * question.seconds)
            answer = msgspec.msgpack.encode(answer_of(question.grammar, tokenizer))
            signal.setitimer(signal.ITIMER_PROF, 0)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        body = pipe.read()
    _, status = os.waitpid(child, 0)
    if body and not os.WIFSIGNALED(status):
        return msgspec.msgpack.decode(body, type=Answer)
    return Answer(signal=os.WTERMSIG(status) or signal.SIGABRT)


def answer_of(grammar: Grammar, tokenizer: Any) -> Answer:
    try:
        return try_out(grammar, tokenizer)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        field = failing_field(grammar.text, tokenizer) if grammar.kind == "lark" else ""
        return Answer(reason=f"{field}: {reason}" if field else reason)


def try_out(grammar: Grammar, tokenizer: Any) -> Answer:
    """Compile a grammar and compute its first mask. ValueError for the client."""
    before = allocated()
    source = source_of(grammar, tokenizer)
    matcher = build_matcher(tokenizer, source)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason_of(matcher))
    if not any(mask):
        raise ValueError("no text matches it")
    return Answer(source, max(0, allocated() - before))


def allocated() -> int:
    """The memory of this process in bytes, without code and without what was freed; 0 where it isn't known."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    resident, shared = map(int, statm.read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()


def limit_memory() -> None:
    """Let allocations beyond ``MEMORY`` fail, which ends the process; only where its present size is known (Linux)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
