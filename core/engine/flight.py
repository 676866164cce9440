"""``BatchInFlight``: a batch that a lane has started, and whose results aren't collected yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from trunkline.core.errors import describe_error
from trunkline.core.types import Step

from .contracts import CheckedStage
from .device.base import Device
from .runner import PassInFlight, Runner
from .scheduling.batch import Batch, forward_passes
from .scheduling.row import Row

log = logging.getLogger("trunkline.engine")

Failures = list[tuple[Row, Exception]]


class UnknownInputs(Exception):
    """A pass that can't be started yet: its rows are computed when the one before it is collected, each alone."""


@dataclass(slots=True)
class Attempt:
    """One forward pass over ``rows``; ``error``: it couldn't be started."""

    rows: Sequence[Row]
    flight: PassInFlight | None
    error: Exception | None = None

    @classmethod
    def start(cls, rows: Sequence[Row], runner: Runner, sources: torch.Tensor | None = None) -> Attempt:
        """Start a pass; ``sources`` as in :meth:`Runner.start`. Raises what breaks the device."""
        try:
            return cls(rows, runner.start(rows, sources))
        except Exception as error:
            if runner.device.broken_by(error):
                raise
            return cls(rows, None, error)

    def collect(self, stages: Mapping[str, CheckedStage], device: Device) -> tuple[list[Step], Failures]:
        """Wait for the pass. Its steps, and the rows that failed, each with its error. Raises what broke it."""
        try:
            if self.error is not None:
                raise self.error
            assert self.flight is not None
            parts = self.flight.wait()
        except Exception as error:
            if device.broken_by(error):
                raise
            if not isinstance(error, UnknownInputs):
                log.warning("a pass over %d rows failed: %s", len(self.rows), describe_error(error), exc_info=error)
            return [], [(row, error) for row in self.rows]
        steps: list[Step] = []
        errors: dict[int, Exception] = {}
        for part, tensors in parts:
            part_steps, failure = stages[part.task].collect(part, tensors)
            steps += part_steps
            if failure is not None:
                with_step = {step.request.key for step in part_steps}
                errors |= {row.request.key: failure for row in part.rows if row.request.key not in with_step}
        return steps, [(row, errors[row.request.key]) for row in self.rows if row.request.key in errors]


@dataclass(slots=True)
class BatchInFlight:
    """``began``: when it was started, by the lane's clock. ``cancelled``: its results aren't used."""

    batch: Batch
    began: float
    resets: list[Step]  # of requests that ended because they couldn't be retracted
    attempts: list[Attempt] = field(default_factory=list)
    cancelled: bool = False

    @property
    def failed(self) -> bool:
        """Whether a pass couldn't be started. What follows can be planned only when it was computed again."""
        return any(attempt.error is not None for attempt in self.attempts)

    @property
    def keys(self) -> list[int]:
        """The keys of its requests."""
        return [row.request.key for row in self.batch.rows]

    def start(self, runner: Runner, note: Callable[[Sequence[int]], None], previous: BatchInFlight | None) -> None:
        """Start its passes. Rows whose input isn't known yet take it from the results of ``previous``."""
        sources, indices = (None, {}) if previous is None else previous._next_ids()
        before = [] if previous is None else previous.keys
        for rows in forward_passes(self.batch.rows):
            note([*before, *(row.request.key for row in rows)])
            awaiting = [row for row in rows if row.start >= len(row.request.tokens)]
            for row in awaiting:
                row.source = indices.get(row.request.key, -1)
            if all(row.source >= 0 for row in awaiting):
                self.attempts.append(Attempt.start(rows, runner, sources))
            else:
                self.attempts.append(Attempt(rows, None, UnknownInputs("a stage that decodes gave no next_ids")))

    def cancel(self) -> None:
        """Wait for its passes; their results won't be used."""
        for attempt in self.attempts:
            if attempt.flight is not None:
                with suppress(Exception):
                    attempt.flight.wait()
        self.cancelled = True

    def _next_ids(self) -> tuple[torch.Tensor | None, dict[int, int]]:
        """The ids that its passes give, int64 ``[N]``, and the index of each request's by its key."""
        found = [pair for attempt in self.attempts if attempt.flight is not None for pair in attempt.flight.next_ids]
        keys = [row.request.key for part, _ in found for row in part.rows]
        tensors = [ids for _, ids in found]
        return (torch.cat(tensors) if tensors else None), {key: index for index, key in enumerate(keys)}
