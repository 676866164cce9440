"""The masks of all rows of a pass, which threads compute while the pass runs.

A pass waits for masks only as long as ordinary ones take. Rows whose masks come later are postponed to a later pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from trunkline.core.types import PartRow

from .state import GrammarState, size_factor
from .threads import lower_priority

THREADS = max(1, min(4, os.cpu_count() or 1))
WAIT_SECONDS = 0.005  # that a pass waits, after its other work …
ROW_SECONDS = 0.0005  # … and for each mask that a thread computes


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of a pass. ``rows``, int64 ``[G]``: indices among the sampled rows. ``jobs``: of ordinary masks."""

    rows: np.ndarray
    states: Sequence[GrammarState]
    words: int  # of a mask
    jobs: Sequence[Future[None]]
    seconds: float
    alone: bool  # all sampled rows have grammars

    def wait(self, device: torch.device) -> torch.Tensor:
        """The masks on the device, int32 ``[G, words]``. Sets ``late`` of the states: theirs allow all tokens."""
        wait(self.jobs, self.seconds)
        if self.alone and not any(state.ready for state in self.states):
            wait([state.job for state in self.states], self.seconds, FIRST_COMPLETED)
        masks = np.full((len(self.states), self.words), -1, np.int32)
        for mask, state in zip(masks, self.states, strict=True):
            state.late = not state.ready
            if not state.late and state.failure is None and not state.over:
                mask[:] = state.mask
        words = torch.from_numpy(masks)
        if device.type == "cpu":
            return words
        return words.pin_memory().to(device, non_blocking=True)


class MaskFiller:
    """Threads that compute the masks of a model's requests: one, at low priority, those that take long."""

    def __init__(self, vocab_size: int) -> None:
        self._words = (vocab_size + 31) // 32
        self._quick = ThreadPoolExecutor(THREADS, "trunkline-mask")
        self._slow = ThreadPoolExecutor(1, "trunkline-slow-mask", lower_priority)

    def start(self, rows: Sequence[PartRow]) -> Masks | None:
        """Begin with the masks of those sampled ``rows`` whose requests have a grammar; None if there are none."""
        found = [(place, row.request.state.grammar) for place, row in enumerate(rows) if row.request.state.grammar]
        if not found:
            return None
        states: list[GrammarState] = [state for _, state in found]
        quick: list[GrammarState] = []
        for state in states:
            if state.idle:
                state.begin()
                if state.spent.slow:
                    _submit(self._slow, state.advance, [state])
                else:
                    quick.append(state)
        groups = [quick[first::THREADS] for first in range(min(THREADS, len(quick)))]
        jobs = [_submit(self._quick, partial(self._advance, group), group) for group in groups]
        places = np.array([place for place, _ in found], np.int64)
        seconds = WAIT_SECONDS + ROW_SECONDS * size_factor(self._words) * len(quick) / THREADS
        return Masks(places, states, self._words, jobs, seconds, alone=len(found) == len(rows))

    def _advance(self, states: Sequence[GrammarState]) -> None:
        for state in states:
            if state.spent.slow:  # found out with another sequence of its request
                _submit(self._slow, state.advance, [state])
            else:
                state.advance()

    def close(self) -> None:
        """Forget the jobs that wait."""
        self._quick.shutdown(wait=False, cancel_futures=True)
        self._slow.shutdown(wait=False, cancel_futures=True)


def _submit(threads: ThreadPoolExecutor, work: Callable[[], None], states: Sequence[GrammarState]) -> Future[None]:
    """Run ``work``, which advances the states, in a thread. They are abandoned if it is closed before."""

    def abandon(job: Future[None]) -> None:
        if job.cancelled():
            for state in states:
                state.abandon()

    try:
        job = threads.submit(work)
    except RuntimeError:  # closed
        job = Future()
        job.cancel()
    job.add_done_callback(abandon)
    return job
