"""Frameworks for applications: their environments, and the programs that use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROGRAMS = Path(__file__).parent / "programs"
TASK = {
    "question": "What is the capital of France?",  # with a short answer
    "prompt": "The capital of France is",
    "tokens": 16,  # at least 16 for the Responses API of OpenAI, and of LiteLLM
    "texts": ["A man is eating.", "Somebody has a meal.", "The sea is calm."],
}
APPLICATIONS = (
    "dspy>=3.4,<4",
    "langchain-openai>=1.7,<2",
    "litellm>=1.110,<2",
    "openai-agents>=0.24,<0.25",
    "pydantic-ai-slim[openai]>=2.68,<3",
    "smolagents[openai]>=1.26,<2",
)
INSTRUCTOR = ("instructor>=1.17,<2", "openai<3")  # with openai 3, jiter would be too new for it
LLAMA_INDEX = (
    "llama-index-core>=0.14.25,<0.15",
    "llama-index-embeddings-openai-like>=0.4,<0.5",
    "llama-index-llms-openai-like>=0.8,<0.9",
)

Run = Callable[..., str]
Outcome = Callable[[str], Any]


@pytest.fixture(scope="session")
def native(generated: Callable[..., Any], vectors_of: Callable[..., Any]) -> SimpleNamespace:
    """What the native routes give for the programs' task: ``answer``, ``completion``, ``tokens``, ``vectors``."""
    answer = generated([{"role": "user", "content": TASK["question"]}], TASK["tokens"])
    return SimpleNamespace(
        answer=answer["text"],
        tokens=answer["meta_info"]["completion_tokens"],
        completion=generated(TASK["prompt"], TASK["tokens"])["text"],
        vectors=np.array(vectors_of(TASK["texts"]), np.float32),
    )


@pytest.fixture(scope="session")
def outcomes(server: Any, vector_server: Any) -> Callable[[Run, str], Outcome]:
    """``outcomes(run, "use_x.py")`` runs a program on its task: a function from a case to what this returned."""
    task = json.dumps(TASK | {"chat": f"{server.url}/v1", "vectors": f"{vector_server.url}/v1"})

    def start(run: Run, program: str) -> Outcome:
        found = json.loads(run(str(PROGRAMS / program), task).splitlines()[-1])

        def outcome(case: str) -> Any:
            if "error" in found[case]:
                pytest.fail(found[case]["error"], pytrace=False)
            return found[case]["value"]

        return outcome

    return start


@pytest.fixture(scope="session")
def applications(installed: Callable[..., Run]) -> Run:
    """Runs programs with frameworks whose requirements agree."""
    return installed("applications", *APPLICATIONS)


@pytest.fixture(scope="session")
def with_instructor(installed: Callable[..., Run]) -> Run:
    return installed("instructor", *INSTRUCTOR)


@pytest.fixture(scope="session")
def llama_index(installed: Callable[..., Run]) -> Run:
    return installed("llama-index", *LLAMA_INDEX)
