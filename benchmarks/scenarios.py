"""The four loads that every server is put under, and what a run of one gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that all arrive at once. The first ``shared`` ids of every prompt are the same."""

    name: str
    prompts: list[list[int]]
    new_tokens: int
    shared: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def distinct_prompt_tokens(self) -> int:
        """Prompt tokens that have to be computed when nothing shared is computed twice."""
        return self.prompt_tokens - self.shared * (len(self.prompts) - 1)


class Result(Struct):
    """One run of a scenario. Times are in seconds."""

    scenario: str
    wall: float  # from the first byte sent to the last one received
    ttft: list[float]  # a request: until its first token
    itl: list[float]  # a token after the first: since the one before
    prompt_tokens: int
    cached_tokens: int
    outputs: list[list[int]]

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.outputs))


def build(seed: int, *, scale: float = 1.0, low: int = 1000, high: int = 30000) -> list[Scenario]:
    """The scenarios with random prompts of token ids in ``[low, high)``.

    Another ``seed`` gives prompts that share nothing with the first. ``scale`` shrinks all lengths
    (a trial run).
    """
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(low, high) for _ in range(max(1, round(count * scale)))]

    new = max(2, round(128 * scale))
    prefix = ids(1024)
    return [
        Scenario("single 128→128", [ids(128)], new),
        Scenario("32 × 128→128", [ids(128) for _ in range(32)], new),
        Scenario("8 × 1024 prefill", [ids(1024) for _ in range(8)], 1),
        Scenario("32 × shared 1024", [prefix + ids(16) for _ in range(32)], max(2, round(16 * scale)), len(prefix)),
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie (nearest rank); NaN when there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
