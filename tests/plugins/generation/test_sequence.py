"""The weight versions in the meta_info of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.types import Submission
from trunkline.plugins.generation.sampling.params import parse_sampling_params
from trunkline.plugins.generation.sequence import OutputSequence


@pytest.mark.parametrize(
    ("former", "label", "tokens", "spans", "shown"),
    [
        ([], "two", 3, None, "two"),
        ([("one", 2)], "two", 3, [("one", 0, 2), ("two", 2, 3)], "two"),
        ([("one", 2), ("two", 3)], "one", 5, [("one", 0, 2), ("two", 2, 3), ("one", 3, 5)], "one"),
        ([("one", 3)], "two", 3, [("one", 0, 3)], "one"),  # it ended before a token was generated with the new weights
    ],
)
async def test_spans_of_weights(
    make_engine: Callable[..., Any],
    former: list[tuple[str, int]],
    label: str,
    tokens: int,
    spans: list[tuple[str, int, int]] | None,
    shown: str,
) -> None:
    engine = make_engine()
    (reply,) = engine.submit("fake", "generation", [Submission(prompt=[1], params=parse_sampling_params({}), rid="x")])
    reply.weight_version, reply.versions, reply.tokens = label, former, [5] * tokens
    meta = OutputSequence(reply, [1], parse_sampling_params({}), engine.models[0], None).meta_info()
    assert meta["weight_version"] == shown
    named = meta.get("weight_versions")
    assert (named and [(span["version"], span["start"], span["end"]) for span in named]) == spans
