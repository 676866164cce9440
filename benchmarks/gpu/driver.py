"""An engine whose loop runs on the caller's thread, so that each turn can be timed: no HTTP, no client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from trunkline.core.client.engine import configure
from trunkline.core.discovery import Plugin, find
from trunkline.core.engine.device.base import Pending
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import Progress, Submit
from trunkline.core.engine.startup import build
from trunkline.core.host import Host


class Turn(NamedTuple):
    """One turn of the loop, in seconds: all of it, and the part in which the host waited for results."""

    seconds: float
    waited: float
    tokens: int  # that requests got

    @property
    def host(self) -> float:
        """The time of the host's own work."""
        return self.seconds - self.waited


class Outcome(NamedTuple):
    """What became of requests. ``cached``: number of prompt tokens. ``tokens``: those of each request, in order."""

    turns: list[Turn]
    cached: int
    tokens: list[list[int]]


@dataclass
class Messages:
    """The engine's end of the connection to a front: what was sent to it, and what it has sent."""

    waiting: list[Any] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)

    def receive(self, *, wait: bool) -> list[Any]:
        """All messages to the engine; it never blocks, since the caller runs the loop."""
        messages, self.waiting = self.waiting, []
        return messages

    def send(self, messages: list[Any]) -> None:
        self.sent += messages

    def wake(self) -> None:
        """It never blocks."""

    def close(self) -> None:
        """Nothing is open."""


class Waits:
    """Measures how long the host waits for downloads of a device, which it wraps."""

    def __init__(self, device: Any) -> None:
        self.seconds = 0.0
        self._download = device.download
        device.download = self.download

    def download(self, tensors: Mapping[str, torch.Tensor]) -> Pending:
        """The device's own, with a clock."""
        return TimedPending(self._download(tensors), self)


@dataclass
class TimedPending:
    """Results whose wait is timed."""

    pending: Pending
    waits: Waits

    def wait(self) -> dict[str, torch.Tensor]:
        began = time.perf_counter()
        results = self.pending.wait()
        self.waits.seconds += time.perf_counter() - began
        return results


class Driver:
    """One model on one engine. ``start_seconds``: of the phases of its start."""

    def __init__(self, folder: Path, weights: ModuleType, **options: Any) -> None:
        """``weights``: a plugin with the hook ``trunkline_weights``. ``options``: settings by name."""
        host = Host([*find(), Plugin("benchmark", weights.__name__, module=weights)])
        started = build(configure(host, (str(folder),), options), host, announce=lambda line: print(line, flush=True))
        (self.lane,) = started.lanes
        self.start_seconds = {name.split()[0]: seconds for name, seconds in started.ready.seconds.items()}
        self._channel = Messages()
        self._loop = EngineLoop(started.lanes, self._channel)
        self._waits = Waits(self.lane.runner.device)
        self._keys = itertools.count(1)
        self._with_graphs, self._overlaps = self.lane.runner, self.lane.runner.device.overlaps

    def choose(self, *, graphs: bool, overlap: bool) -> None:
        """Use CUDA graphs, and overlap host and device, or not. A device without either is unchanged."""
        lane = self.lane
        plain = self._with_graphs.for_model(lane.model, lane.stages, lane.model.expert_watch)
        lane.runner = self._with_graphs if graphs else plain
        lane.runner.device.overlaps = overlap and self._overlaps

    def run(self, task: str, prompts: Sequence[Sequence[int]], params: msgspec.Struct) -> Outcome:
        """Run requests that arrive together to their ends. RuntimeError when one fails."""
        raw = msgspec.Raw(msgspec.msgpack.encode(params))
        tokens: dict[int, list[int]] = {next(self._keys): [] for _ in prompts}
        self._channel.waiting += [
            Submit(key, "", task, str(key), np.array(prompt, np.int32).tobytes(), raw)
            for key, prompt in zip(tokens, prompts, strict=True)
        ]
        turns, cached, unfinished = [], 0, set(tokens)
        while unfinished or self._loop.pipeline.busy:
            turn, progress = self._turn()
            turns.append(turn)
            for one in progress:
                if one.error is not None:
                    raise RuntimeError(f"a request failed: {one.error}")
                tokens[one.key] += one.tokens
                if one.last:
                    unfinished.discard(one.key)
                    cached += one.cached
        return Outcome(turns, cached, list(tokens.values()))

    def _turn(self) -> tuple[Turn, list[Progress]]:
        self._channel.sent = []
        waited, began = self._waits.seconds, time.perf_counter()
        self._loop.turn()
        seconds = time.perf_counter() - began
        progress = [one for one in self._channel.sent if isinstance(one, Progress)]
        return Turn(seconds, self._waits.seconds - waited, sum(len(one.tokens) for one in progress)), progress
