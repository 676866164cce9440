"""Which tasks a checkpoint is served for."""

from __future__ import annotations

import pytest
import torch

from trunkline.core.engine.candidates import Candidate, choose_tasks, cpu_chunk, gpu_chunk, reasons
from trunkline.core.errors import ModelError
from trunkline.core.model.sizes.plan import ModelPlan
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource, Serves
from trunkline.kernels.backend import CPU

INFO = ModelInfo(
    path="m", architecture="Net", model_type="", context_length=8, vocab_size=8, hidden_size=8, causal=True
)
WRITE = Serves("write", "default")
SCORE = Serves("score", "on_request", "Ask for it.")
DRAW = Serves("draw", "no", "It can't draw.")


def choose(*answers: Serves, task: tuple[str, ...] | None = None) -> tuple[list[str], dict[str, Serves]]:
    settings = ModelSettings(model_path="m", task=task)
    return choose_tasks(settings, INFO, {answer.task: answer for answer in answers})


def test_the_defaults_are_served_and_the_rest_is_refused_with_its_reason() -> None:
    assert choose(WRITE, SCORE, DRAW) == (["write"], {"score": SCORE, "draw": DRAW})


def test_a_task_alone_puts_the_other_defaults_on_request() -> None:
    tasks, refused = choose(WRITE, SCORE, DRAW, Serves("embed", "alone"))
    assert tasks == ["embed"]
    assert (refused["score"], refused["draw"]) == (SCORE, DRAW)
    assert refused["write"].reason == (
        "The model was launched for embed alone; add `--task embed,write` to serve write too."
    )


def test_tasks_that_are_asked_for_win() -> None:
    tasks, refused = choose(WRITE, SCORE, Serves("embed", "alone"), task=("write", "score"))
    assert (tasks, list(refused)) == (["write", "score"], ["embed"])


@pytest.mark.parametrize(
    ("task", "words"),
    [(("draw",), "m can't serve draw: It can't draw."), (("sing",), "No plugin serves the task 'sing'; there are:")],
)
def test_what_cannot_be_served_is_said(task: tuple[str, ...], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        choose(WRITE, DRAW, task=task)


def test_a_checkpoint_without_any_task_is_refused_with_all_reasons() -> None:
    with pytest.raises(ModelError, match=r"score: Ask for it\. draw: It can't draw\."):
        choose(SCORE, DRAW)


def test_tasks_share_a_reason_beside_a_stage_that_decodes() -> None:
    embed = Serves("embed", "on_request", "Not by default. (Ask for it.)", common_reason="Not by default.")
    score = Serves("score", "no", "It can't score.", detail="Nor can it score.")
    own = {"embed": embed.reason, "score": score.reason, "draw": DRAW.reason}
    answers = {one.task: one for one in (embed, score, DRAW)}
    assert reasons(answers, decodes=False) == own
    assert reasons(answers, decodes=True) == own | {"score": "Not by default. Nor can it score."}
    assert reasons({"score": score, "draw": DRAW}, decodes=True) == {"score": score.reason, "draw": DRAW.reason}


@pytest.mark.parametrize(
    ("dtype", "parameters", "tokens"),
    [(torch.float32, 100_000_000, 512), (torch.float32, 1_000, 2048), (torch.float32, 70_000_000_000, 32)],
)
def test_a_pass_takes_less_than_a_second_on_a_cpu(dtype: torch.dtype, parameters: int, tokens: int) -> None:
    assert cpu_chunk(parameters, dtype) == tokens


@pytest.mark.parametrize(("gib", "tokens"), [(24, 2048), (48, 4096), (80, 8192), (141, 8192), (192, 16384)])
def test_chunks_on_a_gpu_depend_on_its_memory(gib: int, tokens: int) -> None:
    assert gpu_chunk(gib << 30) == tokens


@pytest.mark.parametrize(("asked", "tokens"), [(None, 2048), (7, 7), (-1, None), (0, None)])
def test_the_chunk_size_that_is_asked_for_wins(asked: int | None, tokens: int | None) -> None:
    source = ModelSource("m", "m")
    sizes = ModelPlan(0, [], 0, torch.float32, 0)
    settings = ModelSettings(model_path="m", chunked_prefill_size=asked)
    assert Candidate(settings, source, source, INFO, [], {}, sizes, 2048, CPU).pass_tokens == tokens
