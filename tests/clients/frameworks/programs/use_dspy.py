"""DSPy: language models, a signature with types, and embeddings."""

from __future__ import annotations

import os
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else a list of prices is downloaded at the import

import dspy
from cases import TASK, report

SERVER: Any = {"api_base": TASK.chat, "api_key": "none", "temperature": 0, "cache": False, "num_retries": 0}


class Sort(dspy.Signature):
    """Say which of these places a sentence is about."""

    sentence: str = dspy.InputField()
    city: Literal["Paris", "Rome", "Oslo"] = dspy.OutputField()


def answer() -> list[Any]:
    model = dspy.LM("openai/default", **SERVER, max_tokens=TASK.tokens)
    [text] = model(TASK.question)
    return [text, model.history[-1]["usage"]["completion_tokens"]]


def completion() -> str:
    [text] = dspy.LM("openai/default", **SERVER, model_type="text", max_tokens=TASK.tokens)(TASK.prompt)
    return str(text)


def responses() -> str:
    [text] = dspy.LM("openai/default", **SERVER, model_type="responses", max_tokens=TASK.tokens)(TASK.question)
    return str(text["text"] if isinstance(text, dict) else text)


def structured_output() -> str:
    """The adapter sends a JSON Schema only if it knows the model's name."""
    with dspy.context(lm=dspy.LM("openai/gpt-4o-mini", **SERVER, max_tokens=200), adapter=dspy.JSONAdapter()):
        return str(dspy.Predict(Sort)(sentence="The fjord is near the opera.").city)


def embeddings() -> list[Any]:
    embedder = dspy.Embedder("openai/default", api_base=TASK.vectors, api_key="none", caching=False)
    return [vector.tolist() for vector in embedder(TASK.texts)]


if __name__ == "__main__":
    report(answer, completion, responses, structured_output, embeddings)
