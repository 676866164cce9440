"""All architectures in a real engine, against transformers on the same fp32 weights.

Logits are within 1e-4, and greedy tokens the same, with chunked prefill beside decoding rows, cached prefixes, and
retraction in a pool that is too small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.testing import ZOO
from trunkline.core.types import Launched, Part, Submission
from trunkline.plugins.generation.schemas import GenerationParams

NEW = 12  # tokens
GAP = 1e-3  # between the best two logits: closer ones may swap


def prompts() -> list[list[int]]:
    """Prompts of 5, 23 and 41 tokens, and one that shares 33 tokens with the third."""
    draw = torch.Generator().manual_seed(7)
    first, second, third = (torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 23, 41))
    return [first, second, third, third[:33] + first]


@dataclass
class Greedy:
    """transformers' greedy continuation of each prompt, and the logits of each step ``[NEW, V]``."""

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@cache
def reference(path: Path) -> Greedy:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    result = Greedy()
    with torch.inference_mode():
        for prompt in prompts():
            ids = list(prompt)
            rows = []
            for _ in range(NEW):
                rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids.append(int(rows[-1].argmax()))
            result.tokens.append(ids[len(prompt) :])
            result.logits.append(torch.stack(rows))
    return result


class RecordedEngine:
    """An engine that records the logits of each request, and its batches."""

    def __init__(self, path: Path, backend: str, **options: Any) -> None:
        self.engine = Engine(str(path), dtype="float32", attention_backend=backend, threads=1, **options)
        (lane,) = self.engine.client.transport.loop.lanes
        self.logits: dict[tuple[str, int], torch.Tensor] = {}  # (rid, position of the new token)
        self.batches: list[Batch] = []
        self.retracted = 0
        stage, head, plan = lane.stages["generation"], lane.model.heads["lm"], lane.scheduler.plan
        launch = stage.launch
        latest: list[torch.Tensor] = []

        def watch_head(hidden: torch.Tensor) -> torch.Tensor:
            latest[:] = [head(hidden)]
            return latest[0]

        def watch_launch(part: Part, hidden: torch.Tensor) -> Launched:
            launched = launch(part, hidden)
            for row, logits in zip(part.rows, latest[0], strict=True):
                self.logits[row.request.rid, row.end] = logits.clone()
            return launched

        def watch_plan(**options: Any) -> Batch | None:
            batch = plan(**options)
            if batch is not None:
                self.batches.append(batch)
                self.retracted += len(batch.retracted)
            return batch

        lane.model.heads["lm"] = watch_head
        stage.launch = watch_launch
        lane.scheduler.plan = watch_plan

    def check(self, path: Path, label: str) -> list[int]:
        """Run all prompts at once and compare; returns the number of cached tokens of each."""
        params = GenerationParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        items = [
            Submission(prompt=prompt, params=params, rid=f"{label}{index}") for index, prompt in enumerate(prompts())
        ]
        tickets = self.engine.submit_all("generation", items)
        expected = reference(path)
        for index, (ticket, prompt) in enumerate(zip(tickets, prompts(), strict=True)):
            tokens = ticket.result(60).tokens
            for step, logits in enumerate(expected.logits[index]):
                ours = self.logits[ticket.reply.rid, len(prompt) + step]
                assert (ours - logits).abs().max() <= 1e-4, f"{label}: prompt {index}, step {step}"
                best, second = logits.topk(2).values
                if best - second < GAP:
                    break  # the other token would be as correct, so the rest can differ
                assert tokens[step] == expected.tokens[index][step]
        return [ticket.reply.cached_tokens for ticket in tickets]


@pytest.fixture
def recorded_engine() -> Iterator[Callable[..., RecordedEngine]]:
    opened: list[RecordedEngine] = []

    def open_engine(*args: Any, **options: Any) -> RecordedEngine:
        opened.append(RecordedEngine(*args, **options))
        return opened[-1]

    yield open_engine
    for recorded in opened:
        recorded.engine.close()


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", ZOO)
def test_chunks_mixed_batches_and_cached_prefixes(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], name: str, backend: str
) -> None:
    path = zoo(name)
    engine = recorded_engine(path, backend, chunked_prefill_size=9)
    cached = engine.check(path, "fresh")
    assert any(0 < batch.decodes < len(batch.rows) for batch in engine.batches), "no batch mixed decoding and prefill"
    assert any(not row.final for batch in engine.batches for row in batch.rows), "no prompt was cut into chunks"
    assert cached[3] >= 32, "the shared prefix was computed twice"
    again = engine.check(path, "again")
    assert again == [len(prompt) - 1 for prompt in prompts()]


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", ZOO)
def test_retraction_changes_nothing(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], name: str, backend: str
) -> None:
    path = zoo(name)
    engine = recorded_engine(path, backend, chunked_prefill_size=16, max_total_tokens=76, disable_radix_cache=True)
    for lane in engine.engine.client.transport.loop.lanes:  # reserve no slots for output, so that the pool becomes full
        lane.scheduler.reserve.ratio = 0.0
    engine.check(path, "tight")
    assert engine.retracted > 0, "nothing was retracted"
