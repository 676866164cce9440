"""A log line about a lane's passes now and then, in the words of SGLang's, which scripts look for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trunkline.core.engine.batch import Batch
from trunkline.core.engine.lane import Lane
from trunkline.core.types import Step

log = logging.getLogger("trunkline.engine")


@dataclass(slots=True)
class Since:
    """What a lane has done since its last line of each kind."""

    decodes: int = 0  # passes
    tokens: int = 0  # of output
    began: float = field(default_factory=time.monotonic)
    prefills: int = 0  # passes without a decoding request
    started: int = 0  # requests
    computed: int = 0  # tokens of prompts
    cached: int = 0


class PassLog:
    """Writes a line every ``interval`` passes that decode, and every ``interval`` passes that don't."""

    def __init__(self, interval: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._since: dict[Lane, Since] = {}

    def passed(self, lane: Lane, batch: Batch, steps: Sequence[Step]) -> None:
        """A pass has ended."""
        since = self._since.get(lane)
        if since is None:
            since = self._since[lane] = Since(began=self._clock())
        since.tokens += sum([len(step.tokens) for step in steps])
        if batch.decodes < len(batch.rows):
            since.computed += batch.tokens - batch.decodes
            since.started += len(batch.started)
            since.cached += sum([request.cached for request in batch.started])
        if batch.decodes:
            since.decodes += 1
            if since.decodes >= self._interval:
                self._log_decodes(lane, batch, since)
        else:
            since.prefills += 1
            if since.prefills >= self._interval:
                self._log_prefills(lane, since)

    def _log_decodes(self, lane: Lane, batch: Batch, since: Since) -> None:
        now = self._clock()
        rate = since.tokens / max(now - since.began, 1e-6)
        log.info(
            "Decode batch, #running-req: %d, %s, gen throughput (token/s): %.2f, #queue-req: %d, model: %s",
            batch.decodes, usage(lane), rate, lane.scheduler.waiting, lane.served.name,
        )  # fmt: skip
        since.decodes, since.tokens, since.began = 0, 0, now

    def _log_prefills(self, lane: Lane, since: Since) -> None:
        log.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, %s, #running-req: %d, #queue-req: %d, "
            "model: %s",
            since.started, since.computed, since.cached, usage(lane), lane.scheduler.running, lane.scheduler.waiting,
            lane.served.name,
        )  # fmt: skip
        since.prefills = since.started = since.computed = since.cached = 0


def usage(lane: Lane) -> str:
    """Slots that requests hold, and their share of all."""
    load = lane.load()
    return f"#token: {load.used}, token usage: {load.used / load.slots:.2f}"
