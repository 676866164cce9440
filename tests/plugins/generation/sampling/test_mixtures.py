"""All sampling features at once: results in mixed batches, chunks, with cache hits and retraction equal those alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.discovery import Plugin, find
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.hookspecs import hookimpl
from trunkline.core.host import Host
from trunkline.core.types import Request, Submission
from trunkline.plugins.generation.sampling.adjust import TokenCounts
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.stage import GenerationStage

NEW = 24  # limit on new tokens
SEEDS = 16
TEXTS = ("a", "[0-9]{2}", "third")  # a stop string, an expression, the return value of a condition
Outcome = tuple[list[int], dict[str, Any]]


class Rising:
    """A processor that prefers ids above the sum of the output ids, so that it depends on every token before."""

    def admit(self, request: Any) -> Any:
        return (request.params.custom_params or {}).get("rising")

    def apply(self, state: float, logits: torch.Tensor, tokens: Any) -> None:
        logits[sum(tokens) % len(logits) :] += state


class Even:
    """A condition that ends a sequence at the third even token; its state counts them."""

    def admit(self, request: Any) -> Any:
        return [] if (request.params.custom_params or {}).get("even") else None

    def check(self, state: list[int], token: int, text: str) -> str | None:
        state += [token] * (token % 2 == 0)
        return TEXTS[2] if len(state) == 3 and text else None


@pytest.fixture
def host() -> Host:
    plugin = ModuleType("rising_plugin")
    for name, made in (("trunkline_logits_processors", Rising), ("trunkline_stop_conditions", Even)):

        def hook(model: Any, made: Any = made) -> list[Any]:
            return [made()]

        setattr(plugin, name, hookimpl(specname=name)(hook))
    return Host([*find(), Plugin("rising", "rising_plugin", module=plugin)])


@pytest.fixture
def opened(zoo: Callable[[str], Path], host: Host) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def open_engine(**options: Any) -> Engine:
        engines.append(Engine(str(zoo("llama")), host=host, dtype="float32", threads=1, **options))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def requests(seed: int) -> list[tuple[list[int], GenerationParams]]:
    """Random prompts, some with a common prefix, and parameters with random features."""
    draw = random.Random(seed)

    def maybe(value: Any, neutral: Any, often: float = 0.5) -> Any:
        return value if draw.random() < often else neutral

    def rarely(value: Any, neutral: Any) -> Any:
        return maybe(value, neutral, 0.15)

    common = draw.choices(range(4, 500), k=20)
    made = []
    for index in range(8):
        prompt = maybe(common, []) + draw.choices(range(4, 500), k=draw.randint(1, 14))
        params = GenerationParams(
            max_new_tokens=draw.choice([1, 6, NEW, NEW, NEW]),
            temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=maybe(40, -1),
            top_p=maybe(0.9, 1.0),
            min_p=maybe(0.02, 0.0),
            seed=draw.randint(-9, 9),
            frequency_penalty=maybe(draw.uniform(-2, 2), 0.0),
            presence_penalty=maybe(draw.uniform(-2, 2), 0.0),
            repetition_penalty=maybe(draw.uniform(0.5, 2), 1.0),
            min_new_tokens=maybe(draw.randint(1, 12), 0),
            stop_token_ids=maybe(tuple(draw.choices(range(500), k=5)), ()),
            logit_bias=maybe(tuple((token, draw.uniform(-5, 5)) for token in range(index, 400, 9)), ()),
            stop=rarely(("zz", TEXTS[0]), ()),
            stop_regex=rarely(("yyy", TEXTS[1]), ()),
            ignore_eos=draw.random() < 0.5,
            custom_params={"rising": maybe(0.5, None), "even": rarely(True, False)},
        )
        made.append((prompt, params))
    return made


def outcomes(engine: Engine, given: list[tuple[list[int], GenerationParams]], label: str) -> list[Outcome]:
    """The tokens and finish reason of each request, when all are submitted at once."""
    items = [
        Submission(prompt=prompt, params=params, rid=f"{label}{index}") for index, (prompt, params) in enumerate(given)
    ]
    replies = [ticket.result(60) for ticket in engine.submit_all("generation", items)]
    return [(reply.tokens, reply.finish or {}) for reply in replies]


def alone(engine: Engine, given: list[tuple[list[int], GenerationParams]]) -> list[Outcome]:
    """The tokens and finish reason of each request alone, with an empty cache."""
    results = []
    for index, request in enumerate(given):
        assert engine.call("flush_cache")
        results += outcomes(engine, [request], f"alone{index}-")
    return results


def small_pool_engine(opened: Callable[..., Engine]) -> tuple[Engine, list[Batch]]:
    """An engine whose pool is too small for all requests, and a list of the batches with retractions."""
    engine = opened(chunked_prefill_size=7, max_total_tokens=60)
    (lane,) = engine.client.transport.loop.lanes
    lane.scheduler.reserve.ratio = 0.0  # reserve no slots for output, so that the pool becomes full
    plan, batches = lane.scheduler.plan, []

    def watched(**options: Any) -> Batch | None:
        batch = plan(**options)
        if batch is not None and batch.retracted:
            batches.append(batch)
        return batch

    lane.scheduler.plan = watched
    return engine, batches


def test_chunks_batches_and_cached_prefixes_change_nothing(opened: Callable[..., Engine]) -> None:
    reference, engine = opened(), opened(chunked_prefill_size=7)
    kinds: set[str] = set()
    for seed in range(SEEDS):
        given = requests(seed)
        expected = alone(reference, given)
        kinds |= {
            type(matched).__name__ if (matched := finish.get("matched")) not in TEXTS else matched
            for _, finish in expected
        }
        assert outcomes(engine, given, f"fresh{seed}-") == expected
        assert outcomes(engine, given, f"again{seed}-") == expected
    assert kinds == {"NoneType", "int", *TEXTS}, "some kind of finish reason didn't occur"


def test_retraction_changes_nothing(opened: Callable[..., Engine]) -> None:
    reference = opened()
    engine, batches = small_pool_engine(opened)
    for seed in range(SEEDS):
        given = requests(seed)
        assert outcomes(engine, given, f"tight{seed}-") == alone(reference, given)
    assert len(batches) >= SEEDS, "hardly anything was retracted"


def test_token_counts_that_are_lost_at_a_retraction_are_detected(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded bug: the token counts are lost at a retraction."""

    def forget(self: GenerationStage, request: Request) -> None:
        if request.state.adjustment is not None and request.state.adjustment.counts is not None:
            request.state.adjustment.counts = TokenCounts([])

    monkeypatch.setattr(GenerationStage, "reset", forget)
    with pytest.raises(AssertionError, match=r"assert \["):
        test_retraction_changes_nothing(opened)
