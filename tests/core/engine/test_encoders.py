"""Models that look both ways through the in-process engine: whole texts, no cache, together and alone the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import Struct

from trunkline.core import Engine
from trunkline.core.discovery import CORE, Plugin, find
from trunkline.core.engine.scheduling.row import Row
from trunkline.core.errors import ModelError, RequestError
from trunkline.core.host import Host
from trunkline.core.types import Launched, Model, Needs, Part, Request, Serves, Stage, Step
from trunkline.plugins.generation.schemas import GenerationParams

MakePlugin = Callable[..., Plugin]
DONE = {"type": "length", "length": 0}


class Nothing(Struct, frozen=True):
    pass


class Rows(Struct, frozen=True):
    data: bytes


class MeanStage(Stage):
    """The mean of all hidden rows, however many passes they take."""

    task = "mean"
    params = Nothing
    result = Rows

    def admit(self, request: Request) -> Needs:
        self.reset(request)
        return Needs(rows_from=0, reuse_up_to=0)

    def reset(self, request: Request) -> None:
        request.state = 0.0

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        lengths = [row.end - row.first for row in part.rows]
        return Launched(tensors={"sums": torch.stack([rows.sum(0) for rows in hidden.float().split(lengths)])})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, total in zip(part.rows, tensors["sums"], strict=True):
            row.request.state = row.request.state + total
            if row.final:
                mean = row.request.state / len(row.request.tokens)
                yield Step(row.request, data=Rows(mean.numpy().tobytes()), finish=DONE)

    def probe(self) -> tuple[list[int], Nothing]:
        return [3], Nothing()


class LastStage(Stage):
    """The last hidden row; a cached prefix may stand in for computing."""

    task = "last"
    params = Nothing
    result = Rows

    def admit(self, request: Request) -> Needs:
        return Needs()

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        return Launched(tensors={"rows": hidden.float()})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, vector in zip(part.rows, tensors["rows"], strict=True):
            yield Step(row.request, data=Rows(vector.numpy().tobytes()), finish=DONE)

    def probe(self) -> tuple[list[int], Nothing]:
        return [3], Nothing()


class ScoreStage(LastStage):
    """Core's head on the rows that it wants."""

    task = "scored"
    heads = ("score",)

    def __init__(self, model: Model) -> None:
        self._model = model

    def admit(self, request: Request) -> Needs:
        return Needs() if self._model.info.score_rows == "last" else Needs(rows_from=0, reuse_up_to=0)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        pooled = []
        for row in part.rows:
            own = hidden[row.offset : row.offset + row.end - row.first]
            kind = self._model.info.score_rows
            pooled.append({"last": own[-1], "first": own[0], "mean": own.mean(0)}[kind])
        return Launched(tensors={"rows": self._model.heads["score"](torch.stack(pooled)).float()})


@pytest.fixture
def host(plugin: MakePlugin) -> Host:
    """The installed plugins, and one with the stages above."""

    def answering(task: str, make: Callable[[Model], Stage]) -> Plugin:
        return plugin(
            task,
            trunkline_serves=lambda: Serves(task, "on_request"),
            trunkline_stages=lambda model: [make(model)],
        )

    own = [
        answering("mean", lambda _: MeanStage()),
        answering("last", lambda _: LastStage()),
        answering("scored", ScoreStage),
    ]
    return Host([*(found for found in find() if found.name in (CORE, "generation")), *own])


@pytest.fixture
def start(zoo: Callable[[str], Path], host: Host) -> Callable[..., Engine]:
    def engine(name: str, **options: Any) -> Engine:
        return Engine(str(zoo(name)), host=host, dtype="float32", threads=1, **options)

    return engine


def texts(count: int, longest: int, seed: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 512, generator.integers(1, longest)).tolist() for _ in range(count)]


def watch(engine: Engine) -> list[list[Row]]:
    """The rows of every pass from now on."""
    (lane,) = engine.client.transport.loop.lanes
    start, passes = lane.runner.start, []

    def spy(rows: Sequence[Row], *sources: Any) -> Any:
        passes.append([replace(row) for row in rows])
        return start(rows, *sources)

    lane.runner.start = spy  # type: ignore[method-assign]
    return passes


def vectors(tickets: Iterable[Any]) -> list[torch.Tensor]:
    return [torch.frombuffer(bytearray(ticket.result(60).data["data"]), dtype=torch.float32) for ticket in tickets]


def eager(folder: Path, auto: str = "AutoModel") -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", ["bert", "modernbert", "xlm-roberta", "mpnet", "qwen2-bidirectional"])
def test_texts_are_computed_whole_and_without_a_cache(
    name: str, start: Callable[..., Engine], zoo: Callable[[str], Path]
) -> None:
    prompts = texts(40, 120)
    with start(name, task=["mean"], chunked_prefill_size=128, max_running_requests=8) as engine:
        served = engine.served()
        passes = watch(engine)
        found = vectors([engine.submit("mean", prompt, Nothing()) for prompt in prompts])
        again = engine.submit("mean", prompts[0], Nothing())
        (repeated,) = vectors([again])
    assert (served.max_total_tokens, served.max_request_tokens, served.max_running_requests) == (512, 512, 8)
    assert all(row.start == 0 and row.final for rows in passes for row in rows)
    assert all(len(rows) <= 8 and sum(row.end for row in rows) <= 512 for rows in passes)
    assert max(len(rows) for rows in passes) > 1
    assert again.reply.cached_tokens == 0
    torch.testing.assert_close(repeated, found[0], atol=1e-5, rtol=0)
    reference = eager(zoo(name))
    with torch.inference_mode():
        for prompt, mine in zip(prompts, found, strict=True):
            theirs = reference(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)
            assert (mine - theirs).abs().max() < 1e-4


def test_the_pass_bounds_what_is_computed_together_and_the_context_what_is_accepted(
    start: Callable[..., Engine],
) -> None:
    with start("bert", task=["mean"], max_total_tokens=100) as engine:
        assert engine.served().max_request_tokens == 100
        passes = watch(engine)
        tickets = [engine.submit("mean", [7] * length, Nothing()) for length in (100, 60, 60, 40, 100)]
        with pytest.raises(RequestError, match="needs 101 tokens"):
            engine.submit("mean", [7] * 101, Nothing()).result(60)
        vectors(tickets)
        assert max(sum(row.end for row in rows) for rows in passes) == 100
    with start("bert", task=["mean"]) as engine:
        assert engine.served().max_total_tokens == 2048
        with pytest.raises(RequestError, match="needs 513 tokens"):
            engine.submit("mean", [7] * 513, Nothing()).result(60)
        assert vectors([engine.submit("mean", [7] * 512, Nothing())])[0].isfinite().all()


def test_token_types_are_those_of_the_pair(start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    pairs = [(prompt, len(prompt) // 3) for prompt in texts(8, 50)]
    with start("bert", task=["mean"]) as engine:
        found = vectors([engine.submit("mean", ids, Nothing(), second_at=at) for ids, at in pairs])
        (single,) = vectors([engine.submit("mean", pairs[0][0], Nothing())])
    reference = eager(zoo("bert"))
    with torch.inference_mode():
        for (ids, at), mine in zip(pairs, found, strict=True):
            types = (torch.arange(len(ids)) >= at).long()[None]
            theirs = reference(torch.tensor([ids]), token_type_ids=types).last_hidden_state[0].mean(0)
            assert (mine - theirs).abs().max() < 1e-4
    assert (single - found[0]).abs().max() > 1e-2  # or the types would not have mattered


@pytest.mark.parametrize("name", ["bert-labels", "modernbert-mean-score", "deberta-labels", "qwen2-labels"])
def test_scores_of_many_texts(name: str, start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    prompts = texts(12, 60)
    with start(name, task=["scored"]) as engine:
        found = vectors([engine.submit("scored", prompt, Nothing()) for prompt in prompts])
    reference = eager(zoo(name), "AutoModelForSequenceClassification")
    with torch.inference_mode():
        for prompt, mine in zip(prompts, found, strict=True):
            assert (mine - reference(input_ids=torch.tensor([prompt])).logits[0]).abs().max() < 1e-4


def test_several_tasks_share_passes_and_the_cache(start: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    prompts = texts(6, 60)
    sampling = GenerationParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    with start("qwen2", task=["generation", "mean", "last"], chunked_prefill_size=32) as engine:
        assert engine.served().tasks == {"generation": True, "mean": False, "last": False}
        passes = watch(engine)
        writers = [engine.submit("generation", prompt, sampling) for prompt in prompts]
        means = vectors([engine.submit("mean", prompt, Nothing()) for prompt in prompts])
        written = [ticket.result(60).tokens for ticket in writers]
        lasts = [engine.submit("last", prompt, Nothing()) for prompt in prompts]
        rows = vectors(lasts)
        later = engine.submit("generation", prompts[0], sampling).result(60)
    assert any(len({row.request.task for row in batch}) > 1 for batch in passes)
    assert [ticket.reply.cached_tokens for ticket in lasts] == [len(prompt) - 1 for prompt in prompts]
    assert (later.tokens, later.cached_tokens) == (written[0], len(prompts[0]) - 1)
    reference = eager(zoo("qwen2"), "AutoModelForCausalLM")
    with torch.inference_mode():
        for prompt, mean, last, new in zip(prompts, means, rows, written, strict=True):
            hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
            assert (mean - hidden.mean(0)).abs().max() < 1e-4
            assert (last - hidden[-1]).abs().max() < 1e-4
            whole = reference(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
            assert whole.argmax(-1).tolist() == new


def test_a_task_without_its_head_is_refused_and_the_others_stay(start: Callable[..., Engine]) -> None:
    with pytest.raises(ModelError, match="no head"):
        start("bert", task=["scored"])
    with start("bert-labels", task=["mean", "scored"]) as engine:
        assert set(engine.served().tasks) == {"mean", "scored"}
        assert math.isclose(len(vectors([engine.submit("mean", [5, 6], Nothing())])[0]), 128)
