"""Logs a line every N passes of a lane, in the format of SGLang's lines, which scripts parse."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.types import Step

log = logging.getLogger("trunkline.engine")


@dataclass(slots=True)
class PassCounts:
    """Counts of one lane since its last line about decoding, and since its last line about prefills."""

    decode_passes: int = 0
    output_tokens: int = 0
    since: float = field(default_factory=time.monotonic)  # time of the last line about decoding
    prefill_passes: int = 0  # passes without a decoding request
    started: int = 0  # requests
    computed: int = 0  # prompt tokens
    cached: int = 0  # prompt tokens


class PassLog:
    """Writes a line every ``interval`` passes that decode, and another every ``interval`` passes that don't."""

    def __init__(self, interval: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._counts: dict[Lane, PassCounts] = {}

    def after_pass(self, lane: Lane, batch: Batch, steps: Sequence[Step]) -> None:
        """Count a pass, and log a line if it is due."""
        counts = self._counts.get(lane)
        if counts is None:
            counts = self._counts[lane] = PassCounts(since=self._clock())
        counts.output_tokens += sum([len(step.tokens) for step in steps])
        if batch.decodes < len(batch.rows):
            counts.computed += batch.tokens - batch.decodes
            counts.started += len(batch.started)
            counts.cached += sum([request.cached for request in batch.started])
        if batch.decodes:
            counts.decode_passes += 1
            if counts.decode_passes >= self._interval:
                self._log_decodes(lane, batch, counts)
        else:
            counts.prefill_passes += 1
            if counts.prefill_passes >= self._interval:
                self._log_prefills(lane, counts)

    def _log_decodes(self, lane: Lane, batch: Batch, counts: PassCounts) -> None:
        now = self._clock()
        rate = counts.output_tokens / max(now - counts.since, 1e-6)
        log.info(
            "Decode batch, #running-req: %d, %s, gen throughput (token/s): %.2f, #queue-req: %d, model: %s",
            batch.decodes, usage(lane), rate, lane.scheduler.waiting, lane.served.name,
        )  # fmt: skip
        counts.decode_passes, counts.output_tokens, counts.since = 0, 0, now

    def _log_prefills(self, lane: Lane, counts: PassCounts) -> None:
        log.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, %s, #running-req: %d, #queue-req: %d, "
            "model: %s",
            counts.started, counts.computed, counts.cached, usage(lane), lane.scheduler.running, lane.scheduler.waiting,
            lane.served.name,
        )  # fmt: skip
        counts.prefill_passes = counts.started = counts.computed = counts.cached = 0


def usage(lane: Lane) -> str:
    """The number of slots that requests hold, and their share of all slots."""
    load = lane.current_load()
    return f"#token: {load.used}, token usage: {load.used / load.slots:.2f}"
