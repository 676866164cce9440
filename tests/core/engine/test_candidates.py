"""Which tasks a checkpoint is served for."""

from __future__ import annotations

import pytest

from trunkline.core.engine.candidates import choose_tasks, reasons
from trunkline.core.errors import ModelError
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, Serves

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
