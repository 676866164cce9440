"""What the engine does now, as server info and metrics tell it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..engine.messages import Load

if TYPE_CHECKING:
    from ..types import ServedModel
    from .supervisor import Supervisor


class Status:
    """Counts results as they pass; the rest it reads off the engine's last heartbeat."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.results = 0  # messages with results since start: a sign of life
        self.throughput = 0.0  # output tokens a second, over the last second that had any
        self._window = (0.0, 0)  # (begin, output tokens since then)
        self._supervisor = supervisor

    def count(self, tokens: int) -> None:
        """A result with so many output tokens has come."""
        self.results += 1
        now = time.perf_counter()
        begin, before = self._window
        if now - begin < 1.0:
            self._window = (begin, before + tokens)
        else:
            if before:
                self.throughput = before / (now - begin)
            self._window = (now, tokens)

    def loads(self) -> list[Load]:
        """Each model's, at most a second old."""
        return self._supervisor.beat.loads

    def of(self, model: ServedModel) -> dict[str, Any]:
        """A model's live keys of ``internal_states``; sizes in GB."""
        names = model.name, *model.aliases  # plan and heartbeat may know it by the name before an update
        load = next((load for load in self.loads() if load.model in names), Load(model.name, 0, 0, 0, 0))
        plan = self._supervisor.ready.plan if self._supervisor.ready is not None else []
        sizes: dict[str, Any] = next((row for row in plan if row["model"] in names), {})
        return {
            "last_gen_throughput": round(self.throughput, 2),
            "memory_usage": {
                "weight": round(sizes.get("weight_bytes", 0) / 1e9, 3),
                "kvcache": round(sizes.get("kv_bytes", 0) / 1e9, 3),
                "token_capacity": load.slots,
                "graph": 0,
            },
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "free_tokens": load.free_slots,
            "engine_restarts": self._supervisor.restarts,
        }
