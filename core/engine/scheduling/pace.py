"""Bounds the prompt chunks of a pass by time, so that they don't delay the requests that decode in it for long."""

from __future__ import annotations

import numpy as np

LEAST = 32  # tokens; most of the time of smaller chunks is that of having any
SCALES = np.array([1.0, 16.0, 1.0, 256.0])  # of the terms below, so that they are of similar size
FORGETTING = 0.98  # factor per pass on the weight of all passes before
UNKNOWN = 1e6  # variance of the coefficients before the first pass


class Pace:
    """Predicts the time of a pass from those that were measured: ``a + b * decodes``, and with prompts
    ``+ c + d * prompt tokens``. The coefficients are fitted by recursive least squares with exponential forgetting.

    ``limit``: seconds that prompts may add to a pass in which requests decode.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._coefficients = np.zeros(4)
        self._covariance = np.eye(4) * UNKNOWN
        self._with_prompts = self._without = False  # which kinds of passes were measured

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A pass with ``decodes`` decoding requests and ``prompt_tokens`` took ``seconds``."""
        self._with_prompts |= prompt_tokens > 0
        self._without |= not prompt_tokens
        terms = np.array([1.0, decodes, prompt_tokens > 0, prompt_tokens]) / SCALES
        gain = self._covariance @ terms
        gain /= FORGETTING + terms @ gain
        self._coefficients += gain * (seconds - terms @ self._coefficients)
        self._covariance = (self._covariance - np.outer(gain, terms @ self._covariance)) / FORGETTING
        np.fill_diagonal(self._covariance, np.minimum(self._covariance.diagonal(), UNKNOWN))

    def tokens(self, chunk: int) -> int:
        """Limit on the prompt tokens of a pass in which requests decode; at most ``chunk``."""
        if not (self._with_prompts and self._without):
            return chunk
        _, _, prompts, per_token = self._coefficients / SCALES
        if per_token <= 0:
            return chunk
        return max(min(LEAST, chunk), min(chunk, int((self._limit - prompts) / per_token)))
