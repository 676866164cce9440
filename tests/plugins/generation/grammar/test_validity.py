"""Sampled output of many schemas is JSON that is valid for them, as the package jsonschema judges."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.model.sources import catalogue

from .conftest import SCHEMAS, problem_of

QUICK = 60  # schemas in ``make test``
BATCH = 24
NEW = 300  # tokens
# They rarely end within NEW tokens where each byte is as likely as any other.
ENDLESS = {"format email", "format hostname", "format uri", "many optional", "mutual recursion", "recursive list"}


def outputs(engine: Any, names: Sequence[str], seed: int, biases: dict[str, float], text: str) -> dict[str, Any]:
    """A record for each schema, sampled in mixed batches."""
    bodies = [
        {
            "text": text,
            "sampling_params": {
                "json_schema": json.dumps(SCHEMAS[name]),
                "max_new_tokens": NEW,
                "temperature": 1.0,
                "sampling_seed": seed,
                "logit_bias": biases,
            },
        }
        for name in names
    ]
    records: list[Any] = []
    for first in range(0, len(bodies), BATCH):
        records += [record for (record,) in engine.together(bodies[first : first + BATCH])]
    return dict(zip(names, records, strict=True))


def check(records: dict[str, Any]) -> set[str]:
    """Assert that every output that ended is valid. The names of those that did."""
    ended = {name for name, record in records.items() if record["meta_info"]["finish_reason"]["type"] == "stop"}
    problems = {name: problem for name in ended if (problem := problem_of(SCHEMAS[name], records[name]["text"]))}
    assert problems == {}, {name: records[name]["text"] for name in problems}
    return ended


def test_there_are_many_schemas() -> None:
    assert len(SCHEMAS) >= 200


def test_a_sample_of_the_schemas(
    recorded_engine: Callable[..., Any], zoo: Callable[[str], Path], endings: dict[str, float]
) -> None:
    names = random.Random(0).sample([name for name in SCHEMAS if name not in ENDLESS], QUICK)
    ended = check(outputs(recorded_engine(zoo("llama")), names, 1, endings, "json"))
    assert len(ended) > 0.9 * QUICK


@pytest.mark.fuzz
def test_all_schemas(
    recorded_engine: Callable[..., Any], zoo: Callable[[str], Path], endings: dict[str, float], suite: Any
) -> None:
    """Of each schema, at least one output must have ended."""
    engine = recorded_engine(zoo("llama"))
    ended: set[str] = set()
    for seed in range(suite.seed, suite.seed + 8):
        ended |= check(outputs(engine, list(SCHEMAS), seed, endings, "json"))
    assert set(SCHEMAS) - ended - ENDLESS == set()


@pytest.mark.fuzz
def test_a_real_model(recorded_engine: Callable[..., Any], suite: Any) -> None:
    """Its tokens have several characters, and its tokenizer is another one."""
    folder = catalogue.fetch("demo:smollm2-135m-instruct")
    names = suite.random.sample([name for name in SCHEMAS if name not in ENDLESS], 24)
    engine = recorded_engine(folder, max_total_tokens=16384)
    ended = check(outputs(engine, names, suite.seed, {}, "A JSON value without spaces: "))
    assert len(ended) >= 8
