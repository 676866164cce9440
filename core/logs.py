"""Logging of both processes: text from clients and files is escaped, so that it can't forge a log line."""

from __future__ import annotations

import logging
import re
import time

MAX_MESSAGE = 8192  # characters of a record's message; the rest is cut off

# Control characters, line and paragraph separators, overrides of the writing direction, lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    r"""The text with control characters written as ``\u000a``; a terminal or a log reader takes it as one line."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


class LineFormatter(logging.Formatter):
    """Writes a record's message on one line. The lines of a traceback are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        message = escape_controls(record.message[:MAX_MESSAGE])
        record.message = message if len(record.message) <= MAX_MESSAGE else f"{message}…"
        return super().formatMessage(record)

    def formatException(self, ei: logging._SysExcInfoType) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"    {escape_controls(line)}" for line in text.split("\n"))


def configure_logging(level: str) -> None:
    """Log to standard error from ``level`` on, warnings included. Does nothing when logging is configured already."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)


class RateLimited:
    """For messages that clients can cause: logs one per ``seconds`` at most, with the number of those left out."""

    def __init__(self, logger: logging.Logger, level: int, seconds: float) -> None:
        self._logger = logger
        self._level = level
        self._seconds = seconds
        self._next = 0.0  # monotonic time from which on a message is logged again
        self._left_out = 0

    def log(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        if self._left_out:
            message += f" ({self._left_out} similar ones were not logged)"
        self._next, self._left_out = now + self._seconds, 0
        self._logger.log(self._level, message, *args)
