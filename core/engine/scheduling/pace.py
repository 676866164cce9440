"""Bounds the prompt chunks of a pass by time, so that they don't delay the requests that decode in it for long."""

from __future__ import annotations

SMOOTHING = 0.2  # weight of a new measurement
LEAST = 32  # tokens; smaller chunks take hardly less time
SAMPLE = 64  # prompt tokens of a pass from which their speed is measured
RELATIVE = 2.0  # default limit: the time of a chunk, divided by that of the decoding beside it


class Pace:
    """Measures how long passes take, and bounds the chunks of prompts beside decoding requests by their time.

    ``limit``: seconds that prompts may add to a pass in which requests decode; None is ``RELATIVE`` times what the
    pass takes without prompts, so that the time between two tokens is at most three times the usual.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._decoding = 0.0  # seconds of a pass without prompts; 0 = not measured yet
        self._token = 0.0  # seconds of one prompt token; 0 = not measured yet

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A pass with ``decodes`` decoding requests and ``prompt_tokens`` took ``seconds``."""
        if not prompt_tokens:
            self._decoding = _smoothed(self._decoding, seconds)
        elif prompt_tokens >= SAMPLE:
            own = seconds - (self._decoding if decodes else 0.0)
            self._token = _smoothed(self._token, max(own, 0.1 * seconds) / prompt_tokens)

    def tokens(self, chunk: int) -> int:
        """Limit on the prompt tokens of a pass in which requests decode; at most ``chunk``."""
        limit = RELATIVE * self._decoding if self._limit is None else self._limit
        if not self._token or not limit:
            return chunk
        return max(min(LEAST, chunk), min(chunk, int(limit / self._token)))


def _smoothed(before: float, now: float) -> float:
    return before + SMOOTHING * (now - before) if before else now
