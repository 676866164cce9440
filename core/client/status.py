"""``Status``: the load and throughput of the engine, for server info, health checks and metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trunkline.core.engine.messages import Load
from trunkline.core.types import current_replica

if TYPE_CHECKING:
    from trunkline.core.types import ServedModel

    from .replies import EngineReply
    from .transport import Transport

NO_REPLIES: Mapping[int, EngineReply] = {}

WINDOW = 1.0  # seconds over which output tokens are counted
MIN_WINDOW = 0.1  # seconds; while the current window is shorter, the previous one gives the throughput
IDLE_SECONDS = 2.0  # time without output after which the throughput is 0
RECENT = 256  # number of requests over which the cache hit rate is computed


class Status:
    """Counts the results that arrive. Numbers of requests are the front's, those of slots the last heartbeat's.

    Of one of several replicas (:func:`core.types.on_replica`), all numbers are the last heartbeat's.
    """

    def __init__(
        self,
        transport: Transport,
        live: Mapping[int, EngineReply] = NO_REPLIES,
        waiting: Mapping[int, EngineReply] = NO_REPLIES,
    ) -> None:
        """``live``: all requests that haven't ended; ``waiting``: those of them that the engine hasn't started."""
        self.results = 0  # messages with results since the start; health checks compare it
        self._begin = self._latest = -math.inf  # times of the first and the last output in the current window
        self._tokens = 0  # output tokens in the current window after the first output
        self._rate = 0.0  # tokens per second in the previous window
        self._transport = transport
        self._live, self._waiting = live, waiting
        self._prompts: deque[tuple[int, int]] = deque(maxlen=RECENT)  # prompt tokens, cached ones

    def started(self, prompt: int, cached: int) -> None:
        """A request has left the waiting queue: its number of prompt tokens, and how many of them were cached."""
        self._prompts.append((prompt, cached))

    @property
    def cache_hit_rate(self) -> float:
        """The cached share, 0 to 1, of the prompt tokens of the latest requests."""
        prompts, cached = (sum(column) for column in zip(*self._prompts, strict=True)) if self._prompts else (0, 0)
        return cached / prompts if prompts else 0.0

    def count(self, tokens: int) -> None:
        """A message with results has arrived; ``tokens``: its number of output tokens."""
        self.results += 1
        if not tokens:
            return
        now = time.perf_counter()
        if now - self._latest > WINDOW:  # idle time and the time to the first output are in no window
            self._rate, self._begin, self._tokens = self.last_throughput, now, 0
        else:
            self._tokens += tokens
            if now - self._begin >= WINDOW:
                self._rate, self._begin, self._tokens = self._tokens / (now - self._begin), now, 0
        self._latest = now

    @property
    def last_throughput(self) -> float:
        """Output tokens per second, over about the last second with output."""
        span = self._latest - self._begin
        return self._tokens / span if self._tokens and span >= MIN_WINDOW else self._rate

    @property
    def throughput(self) -> float:
        """Output tokens per second; 0 after ``IDLE_SECONDS`` without output."""
        return self.last_throughput if time.perf_counter() - self._latest < IDLE_SECONDS else 0.0

    def loads(self) -> list[Load]:
        """The load of each model by the last heartbeat, usually at most a second ago."""
        return self._transport.beat.loads

    def model_state(self, model: ServedModel) -> dict[str, Any]:
        """A model's current keys of ``internal_states`` in server info; sizes in GB."""
        load = next((load for load in self.loads() if load.model == model.name), Load(model.name, 0, 0, 0, 0, 0))
        plan = self._transport.ready.plan if self._transport.ready is not None else []
        sizes: dict[str, Any] = next((row for row in plan if row["model"] == model.name), {})
        names = (model.name, *model.aliases)  # requests keep the name that they were submitted with
        waits = [reply.prompt_tokens for reply in self._waiting.values() if reply.model in names]
        running = sum(reply.model in names for reply in self._live.values()) - len(waits)
        retracted = min(load.retracted, running)
        running, waiting, waiting_tokens = running - retracted, len(waits) + retracted, sum(waits)
        if current_replica.get() is not None:  # the front doesn't know which of its requests are there
            running, waiting, waiting_tokens = load.running, load.waiting, load.waiting_tokens
        return {
            "last_gen_throughput": round(self.last_throughput, 2),
            "gen_throughput": round(self.throughput, 2),
            "memory_usage": {
                "weight": round(sizes.get("weight_bytes", 0) / 1e9, 3),
                "kvcache": round(sizes.get("kv_bytes", 0) / 1e9, 3),
                "token_capacity": load.slots,
                "graph": 0,
            },
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_waiting_tokens": waiting_tokens,
            "cache_hit_rate": round(self.cache_hit_rate, 4),
            "free_tokens": load.free_slots,
            "num_used_tokens": load.used,
            "engine_restarts": self._transport.restarts,
        }
