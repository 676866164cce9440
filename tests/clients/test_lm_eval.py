"""lm-eval through its clients for servers gets what its ``hf`` model computes from the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("lm_eval",)
SET = "`base_url`: the server's address with the route: `/generate`, `/v1/completions` or `/v1/chat/completions`"

TASKS = Path(__file__).parent / "tasks"
QUESTIONS, CHOICES, TEXTS = "trunkline_questions", "trunkline_choices", "trunkline_texts"
ROUTES = {
    "sglang-generate": "/generate",
    "local-completions": "/v1/completions",
    "local-chat-completions": "/v1/chat/completions",
}
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


def evaluate(
    run: Callable[..., str], model: str, arguments: dict[str, Any], tasks: list[str], folder: Path, *flags: str
) -> Outcome:
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "lm_eval", "run", "--model", model, "--model_args", given, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(TASKS), "--output_path", str(folder), "--log_samples", "--device", "cpu", *flags]
    run(*command, cwd=TASKS)
    return Outcome(folder)


@pytest.fixture(scope="module")
def transformers(lm_eval: Callable[..., str], demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All tasks by lm-eval's ``hf`` model."""
    arguments = {"pretrained": demo, "dtype": "float32"}
    return evaluate(lm_eval, "hf", arguments, [QUESTIONS, CHOICES, TEXTS], tmp_path_factory.mktemp("hf"))


@pytest.fixture
def served(lm_eval: Callable[..., str], demo: Path, server: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """A task by a client of lm-eval and the live server."""

    def run(client: str, task: str, *flags: str, **more: Any) -> Outcome:
        arguments = {"base_url": f"{server.url}{ROUTES[client]}", "pretrained": demo, "num_concurrent": 4}
        arguments |= {"tokenizer_backend": "huggingface", "max_length": 2048} | more
        return evaluate(lm_eval, client, arguments, [task], tmp_path, *flags)

    return run


@pytest.mark.parametrize(
    ("client", "options"),
    [
        ("sglang-generate", {"tokenized_requests": True}),
        ("sglang-generate", {"tokenized_requests": False}),
        ("local-completions", {"tokenized_requests": False}),
        ("local-completions", {"tokenizer_backend": "remote"}),
    ],
)
def test_answers_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome, client: str, options: dict[str, Any]
) -> None:
    ours = served(client, QUESTIONS, **options)
    assert ours.responses(QUESTIONS) == transformers.responses(QUESTIONS)
    assert ours.metrics(QUESTIONS) == transformers.metrics(QUESTIONS)


def test_answers_in_a_chat_are_those_of_transformers(
    served: Callable[..., Outcome], lm_eval: Callable[..., str], demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chat = "--apply_chat_template"
    arguments = {"pretrained": demo, "dtype": "float32"}
    theirs = evaluate(lm_eval, "hf", arguments, [QUESTIONS], tmp_path_factory.mktemp("hf-chat"), chat)
    ours = served("local-chat-completions", QUESTIONS, chat)
    assert ours.responses(QUESTIONS) == theirs.responses(QUESTIONS)
    assert ours.metrics(QUESTIONS) == theirs.metrics(QUESTIONS)


# The second value of sglang-generate, whether the text is the greedy one, is wrong in lm-eval 0.4.13: parse_logprobs
# compares with != where it means ==. That of local-completions is right.


@pytest.mark.parametrize(("client", "prompts"), [("sglang-generate", 1), ("local-completions", 4)])
def test_log_likelihoods_of_choices_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome, client: str, prompts: int
) -> None:
    ours = served(client, CHOICES, "--batch_size", str(prompts), tokenized_requests=True)
    pairs = list(zip(ours.responses(CHOICES), transformers.responses(CHOICES), strict=True))
    assert len(pairs) == len(json.loads((TASKS / "choices.json").read_text()))
    for mine, theirs in pairs:
        assert [float(one[0]) for one in mine] == pytest.approx([float(one[0]) for one in theirs], abs=NEAR)
        if client == "local-completions":
            assert [one[1] for one in mine] == [one[1] for one in theirs]
    assert ours.metrics(CHOICES) == transformers.metrics(CHOICES)


@pytest.mark.parametrize("client", ["sglang-generate", "local-completions"])
def test_log_likelihoods_of_whole_texts_are_those_of_transformers(
    served: Callable[..., Outcome], transformers: Outcome, client: str
) -> None:
    ours = served(client, TEXTS, tokenized_requests=True)
    [mine, theirs] = ([float(one) for [one] in outcome.responses(TEXTS)] for outcome in (ours, transformers))
    assert mine == pytest.approx(theirs, abs=NEAR)
    assert all(value < -10 for value in mine)
