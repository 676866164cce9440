"""lm-eval through its own client ``sglang-generate`` gets what its ``hf`` model computes from the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients

TASKS = Path(__file__).parent / "tasks"
QUESTIONS, CHOICES, TEXTS = "trunkline_questions", "trunkline_choices", "trunkline_texts"
NEAR = 1e-3  # of a log-likelihood, float32


class Outcome:
    """What one run of lm-eval wrote: ``metrics`` of a task, and the model's responses by document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def metrics(self, task: str) -> dict[str, Any]:
        [path] = self.folder.rglob("results_*.json")
        found = json.loads(path.read_text())["results"][task]
        return {name: value for name, value in found.items() if isinstance(value, float) and "stderr" not in name}

    def responses(self, task: str) -> list[list[Any]]:
        """By document: its texts, or a log-likelihood for each of its choices."""
        [path] = self.folder.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        return [[answer for answers in sample["resps"] for answer in answers] for sample in samples]


def evaluate(run: Callable[..., str], model: str, arguments: dict[str, Any], tasks: list[str], folder: Path) -> Outcome:
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "lm_eval", "run", "--model", model, "--model_args", given, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(TASKS), "--output_path", str(folder), "--log_samples", "--device", "cpu"]
    run(*command, cwd=TASKS)
    return Outcome(folder)


@pytest.fixture(scope="module")
def transformers(lm_eval: Callable[..., str], demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All tasks by lm-eval's ``hf`` model."""
    arguments = {"pretrained": demo, "dtype": "float32"}
    return evaluate(lm_eval, "hf", arguments, [QUESTIONS, CHOICES, TEXTS], tmp_path_factory.mktemp("hf"))


@pytest.fixture
def served(lm_eval: Callable[..., str], demo: Path, server: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """A task by ``sglang-generate`` and the live server."""

    def run(task: str, **more: Any) -> Outcome:
        arguments = {"base_url": f"{server.url}/generate", "pretrained": demo, "tokenizer_backend": "huggingface"}
        arguments |= {"tokenized_requests": True, "num_concurrent": 4, "max_length": 2048} | more
        return evaluate(lm_eval, "sglang-generate", arguments, [task], tmp_path)

    return run


@pytest.mark.parametrize("tokenized", [True, False])
def test_answers_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome, tokenized: bool
) -> None:
    ours = served(QUESTIONS, tokenized_requests=tokenized)
    assert ours.responses(QUESTIONS) == transformers.responses(QUESTIONS)
    assert ours.metrics(QUESTIONS) == transformers.metrics(QUESTIONS)


# The client's second value, whether the text is the greedy one, is wrong in lm-eval 0.4.13: parse_logprobs compares
# with != where it means ==. So only log-likelihoods and what is made of them are compared.


def test_log_likelihoods_of_choices_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome
) -> None:
    ours = served(CHOICES)
    pairs = list(zip(ours.responses(CHOICES), transformers.responses(CHOICES), strict=True))
    assert len(pairs) == len(json.loads((TASKS / "choices.json").read_text()))
    for mine, theirs in pairs:
        assert [float(one[0]) for one in mine] == pytest.approx([float(one[0]) for one in theirs], abs=NEAR)
    assert ours.metrics(CHOICES) == transformers.metrics(CHOICES)


def test_log_likelihoods_of_whole_texts_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome
) -> None:
    ours = served(TEXTS)
    [mine, theirs] = ([float(one) for [one] in outcome.responses(TEXTS)] for outcome in (ours, transformers))
    assert mine == pytest.approx(theirs, abs=NEAR)
    assert all(value < -10 for value in mine)
