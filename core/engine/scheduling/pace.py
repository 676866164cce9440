"""Bounds the prompt chunks of a pass by time, so that they don't delay the requests that decode in it for long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STRETCH = 2.5  # by default, prompts may make a pass this many times as long as passes without them usually are …
OWN_STRETCH = 1.6  # … or this many times as long as the same pass would be without them, if that is more
BURST_FROM = 2  # passes may be longer when more prompts than this wait …
BURST = 6.0  # … and this many times as long at most
LEAST = 16  # tokens; smaller chunks would cost more passes than they are worth
SCALES = np.array([1.0, 16.0, 1.0, 256.0])  # of the terms below, so that they are of similar size
FORGETTING = 0.995  # factor per pass on the weight of all passes before
UNKNOWN = 1e6  # variance of the coefficients before the first pass
KNOWN = 0.5  # variance of a prediction, in units of a measurement's, below which it is trusted …
OUTLIER = 3.0  # … so that a pass that takes longer than this many times the prediction was interrupted
STEP = 0.003  # by which a measurement moves the usual time of a pass without prompts, per decoding request …
MAX_STEP = 0.1  # … and in all, at most


class Pace:
    """Predicts the time of a pass from those that were measured: ``a + b * decodes``, and with prompts
    ``+ c + d * prompt tokens``. The coefficients are fitted by recursive least squares with exponential forgetting.

    ``limit``: seconds that prompts may add to a pass in which requests decode. With None, the whole pass may take
    STRETCH times as long as one without prompts usually takes, so that the longest intervals between tokens are in
    proportion to most of them. When more requests decode than usual, that may leave no time for prompts, hence
    OWN_STRETCH. When many prompts wait, a pass may take longer, since smaller chunks need more passes in all: what the
    prompts wait together grows with the square of their number, the delay of decoding requests with theirs.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self.forget()

    def forget(self) -> None:
        """Forget all passes, such as those that compiled kernels."""
        self._coefficients = np.zeros(4)
        self._covariance = np.eye(4) * UNKNOWN
        self._with_prompts = False  # whether a pass with prompts was measured
        self._usual = 0.0  # seconds of a pass without prompts: the median over recent tokens; 0 = none was measured

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A pass with ``decodes`` decoding requests and ``prompt_tokens`` took ``seconds``."""
        self._with_prompts |= prompt_tokens > 0
        if not prompt_tokens:
            step = min(STEP * decodes, MAX_STEP)
            self._usual = self._usual * (1 + step if seconds > self._usual else 1 - step) or seconds
        terms = np.array([1.0, decodes, prompt_tokens > 0, prompt_tokens]) / SCALES
        expected = float(terms @ self._coefficients)
        gain = self._covariance @ terms
        variance = float(terms @ gain)
        if expected > 0 and variance < KNOWN:
            seconds = min(seconds, OUTLIER * expected)
        gain /= FORGETTING + variance
        self._coefficients += gain * (seconds - expected)
        self._covariance = (self._covariance - np.outer(gain, terms @ self._covariance)) / FORGETTING
        variances = self._covariance.diagonal()
        if variances.max() > UNKNOWN:  # passes that are all alike say nothing about some terms
            # Whole rows and columns: an off-diagonal element that is left would grow until it overflows.
            scale = np.sqrt(UNKNOWN / np.maximum(variances, UNKNOWN))
            self._covariance *= np.outer(scale, scale)

    @property
    def delay(self) -> float | None:
        """Seconds that may be added to a pass in which requests decode; None while there is nothing to go by."""
        return (STRETCH - 1) * self._usual or None if self._limit is None else self._limit

    def tokens(self, chunk: int, decodes: int, waiting: int, *, models: int = 1) -> int:
        """Limit on the prompt tokens of a pass in which ``decodes`` requests decode; at most ``chunk``.

        ``waiting``: how many admitted prompts are to be computed, in this pass and later ones. ``models``: how many
        have work; the time that may be added is divided among their passes, which alternate.
        """
        if not self._usual:
            return chunk
        fixed, per_decode = (float(each) for each in (self._coefficients / SCALES)[:2])
        alone = fixed + per_decode * decodes
        burst = min(max(1.0, max(0, waiting - BURST_FROM) ** 2 / decodes), BURST)
        longest = burst * max(STRETCH * self._usual, OWN_STRETCH * alone)
        return self._tokens_in((longest - alone if self._limit is None else self._limit) / models, chunk)

    def tokens_beside(self, delays: Sequence[float | None], most: int) -> int:
        """Limit on the tokens of a pass of prompts, at most ``most``, beside other models that have work.

        ``delays``: by how much their decoding requests may be delayed, see :attr:`.Scheduler.delay`.
        """
        seconds = min((delay for delay in delays if delay is not None), default=None)
        if seconds is None:
            return most
        return self._tokens_in(seconds / len(delays) - float(self._coefficients[0] / SCALES[0]), most)

    def _tokens_in(self, seconds: float, most: int) -> int:
        """How many prompt tokens take this time, LEAST to ``most``; ``most`` as long as that isn't known."""
        prompts, per_token = (float(each) for each in (self._coefficients / SCALES)[2:])
        if not self._with_prompts or per_token <= 0:
            return most
        return max(min(LEAST, most), min(most, int((seconds - prompts) / per_token)))
