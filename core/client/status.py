"""Load and progress of the engine, for server info and metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trunkline.core.engine.messages import Load

if TYPE_CHECKING:
    from trunkline.core.types import ServedModel

    from .replies import EngineReply
    from .transport import Transport

NOBODY: Mapping[int, EngineReply] = {}

WINDOW = 1.0  # seconds over which output tokens are counted
RECENT = 256  # requests whose cached share is told
SETTLED = 0.1  # seconds after which a window's rate says more than the one before
IDLE = 2.0  # seconds without output


class Status:
    """Counts results as they pass; requests are those of the front, slots those of the engine's last heartbeat."""

    def __init__(
        self,
        transport: Transport,
        live: Mapping[int, EngineReply] = NOBODY,
        waiting: Mapping[int, EngineReply] = NOBODY,
    ) -> None:
        """``live``: all requests that aren't over, ``waiting``: those of them that the engine hasn't started."""
        self.results = 0  # messages with results since start: a sign of life
        self._begin = self._latest = -math.inf  # of the window, by the first and the last output in it
        self._tokens = 0  # since the window's begin
        self._rate = 0.0  # of the window before
        self._transport = transport
        self._live, self._waiting = live, waiting
        self._prompts: deque[tuple[int, int]] = deque(maxlen=RECENT)  # tokens, and those of them that were cached

    def started(self, prompt: int, cached: int) -> None:
        """A request has left the queue, with so many prompt tokens and so many of them cached."""
        self._prompts.append((prompt, cached))

    @property
    def cache_hit_rate(self) -> float:
        """Cached share of the prompt tokens of the latest requests."""
        prompts, cached = (sum(column) for column in zip(*self._prompts, strict=True)) if self._prompts else (0, 0)
        return cached / prompts if prompts else 0.0

    def count(self, tokens: int) -> None:
        """A result with so many output tokens has come."""
        self.results += 1
        if not tokens:
            return
        now = time.perf_counter()
        if now - self._latest > WINDOW:  # a pause is in no window, nor is what took until the first output
            self._rate, self._begin, self._tokens = self.last_throughput, now, 0
        else:
            self._tokens += tokens
            if now - self._begin >= WINDOW:
                self._rate, self._begin, self._tokens = self._tokens / (now - self._begin), now, 0
        self._latest = now

    @property
    def last_throughput(self) -> float:
        """Output tokens a second in the last second or so that had any."""
        span = self._latest - self._begin
        return self._tokens / span if self._tokens and span >= SETTLED else self._rate

    @property
    def throughput(self) -> float:
        """The same, and 0 when nothing comes out."""
        return self.last_throughput if time.perf_counter() - self._latest < IDLE else 0.0

    def loads(self) -> list[Load]:
        """Each model's, at most a second old."""
        return self._transport.beat.loads

    def of(self, model: ServedModel) -> dict[str, Any]:
        """A model's live keys of ``internal_states``; sizes in GB."""
        load = next((load for load in self.loads() if load.model == model.name), Load(model.name, 0, 0, 0, 0))
        plan = self._transport.ready.plan if self._transport.ready is not None else []
        sizes: dict[str, Any] = next((row for row in plan if row["model"] == model.name), {})
        names = (model.name, *model.aliases)  # of those that were submitted before an update renamed it
        waiting = [reply.prompt_tokens for reply in self._waiting.values() if reply.model in names]
        live = sum(reply.model in names for reply in self._live.values())
        return {
            "last_gen_throughput": round(self.last_throughput, 2),
            "gen_throughput": round(self.throughput, 2),
            "memory_usage": {
                "weight": round(sizes.get("weight_bytes", 0) / 1e9, 3),
                "kvcache": round(sizes.get("kv_bytes", 0) / 1e9, 3),
                "token_capacity": load.slots,
                "graph": 0,
            },
            "num_running_reqs": live - len(waiting),
            "num_waiting_reqs": len(waiting),
            "num_waiting_tokens": sum(waiting),
            "cache_hit_rate": round(self.cache_hit_rate, 4),
            "free_tokens": load.free_slots,
            "num_used_tokens": load.used,
            "engine_restarts": self._transport.restarts,
        }
