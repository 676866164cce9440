"""The grammar of one request, and the masks of all rows of a pass, which threads compute while the pass runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from trunkline.core.errors import RequestError, describe_error
from trunkline.core.types import PartRow
from trunkline.plugins.generation.hooks import CompiledGrammar, GrammarMatcher
from trunkline.plugins.generation.schemas import Grammar

log = logging.getLogger("trunkline.generation")

THREADS = max(1, min(4, os.cpu_count() or 1))
# CPU time: a mask takes far below 1 ms for ordinary grammars, and all requests of a pass wait for it.
TOKEN_SECONDS = 0.005  # of one token's mask; what exceeds it, is added up
MAX_EXCESS = 0.5  # seconds of a request

FAILED_MESSAGE = "The grammar engine failed; the server's log has the reason."


class GrammarState:
    """Follows a request's output. ``failure``: the error that ends the request, None if there is none."""

    __slots__ = ("_excess", "_forget", "_matcher", "failure", "filling", "grammar")

    def __init__(self, grammar: Grammar, compiled: CompiledGrammar, forget: Callable[[], None]) -> None:
        """``forget`` is called when the matcher fails: the next request gets a grammar that is compiled anew."""
        self.grammar = grammar
        self._forget = forget
        self.failure: RequestError | None = None
        self.filling: Future[None] | None = None  # computes a mask
        self._excess = 0.0
        self._matcher: GrammarMatcher

        def make() -> None:
            self._matcher = compiled.matcher()

        self._guard(make)

    def accept(self, token: int) -> None:
        """Advance by a sampled token; sets ``failure`` if the matcher gives up."""
        self._guard(lambda: self._matcher.accept(token))

    @property
    def finished(self) -> bool:
        """Whether the grammar allows no further token."""
        over = False

        def read() -> None:
            nonlocal over
            over = bool(self._matcher.finished)

        self._guard(read)
        return over

    def fill(self, mask: np.ndarray) -> None:
        """Set the mask of the next token, int32 ``[words]``. All tokens, if the matcher gives up: none is used."""
        self._guard(lambda: self._matcher.fill(mask))
        if self.failure is not None:
            mask[:] = -1

    def no_token_error(self) -> RequestError:
        """The error for a row in which no token is left."""
        kind = self.grammar.kind
        return RequestError(
            f"{kind}: logit_bias, min_new_tokens, stop tokens or a logits processor forbid every token that the "
            "grammar allows here; the request was ended.",
            param=kind,
        )

    def _guard(self, call: Callable[[], None]) -> None:
        """Call the matcher, unless it has failed; keep what it raises, and measure its time."""
        if self.failure is not None:
            return
        began = time.thread_time()
        try:
            call()
        except ValueError as error:
            self.failure = self._ended(str(error))
            self._forget()
        except BaseException as error:  # of a plugin, SystemExit too
            log.error("a grammar engine's matcher raised %s", describe_error(error), exc_info=error)
            self.failure = RequestError(FAILED_MESSAGE, status=500)
        self._excess += max(0.0, time.thread_time() - began - TOKEN_SECONDS)
        if self._excess > MAX_EXCESS and self.failure is None:
            self.failure = self._ended("it takes too much time for each token")

    def _ended(self, reason: str) -> RequestError:
        kind = self.grammar.kind
        return RequestError(f"The {kind} grammar can't be followed any further: {reason}", param=kind)


class Masks(NamedTuple):
    """The masks of a pass. ``rows``, int64 ``[G]``: indices among the sampled rows."""

    rows: np.ndarray
    words: np.ndarray  # int32 [G, ceil(V / 32)]
    jobs: Sequence[Future[None]]

    def wait(self, device: torch.device) -> torch.Tensor:
        """The masks on the device. Blocks until they are computed."""
        wait(self.jobs)
        words = torch.from_numpy(self.words)
        if device.type == "cpu":
            return words
        return words.pin_memory().to(device, non_blocking=True)


class MaskFiller:
    """Threads that compute the masks of a model's requests."""

    def __init__(self, vocab_size: int) -> None:
        self._words = (vocab_size + 31) // 32
        self._threads = ThreadPoolExecutor(THREADS, "trunkline-mask")

    def start(self, rows: Sequence[PartRow]) -> Masks | None:
        """Begin with the masks of those sampled ``rows`` whose requests have a grammar; None if there are none."""
        found = [(place, row.request.state.grammar) for place, row in enumerate(rows) if row.request.state.grammar]
        if not found:
            return None
        words = np.empty((len(found), self._words), np.int32)
        states = [state for _, state in found]
        wait([state.filling for state in states if state.filling is not None])  # of a pass that failed
        jobs = []
        for first in range(min(THREADS, len(states))):
            job = self._threads.submit(_fill_all, states[first::THREADS], words[first::THREADS])
            jobs.append(job)
            for state in states[first::THREADS]:
                state.filling = job
        return Masks(np.array([place for place, _ in found], np.int64), words, jobs)


def _fill_all(states: Sequence[GrammarState], masks: np.ndarray) -> None:
    for state, mask in zip(states, masks, strict=True):
        state.fill(mask)
