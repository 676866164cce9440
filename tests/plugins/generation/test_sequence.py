"""What a sequence says of the weights that it was made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.types import Submission
from trunkline.plugins.generation.sampling.params import parse_sampling
from trunkline.plugins.generation.sequence import Sequence


@pytest.mark.parametrize(
    ("former", "label", "tokens", "spans", "shown"),
    [
        ([], "two", 3, None, "two"),
        ([("one", 2)], "two", 3, [("one", 0, 2), ("two", 2, 3)], "two"),
        ([("one", 2), ("two", 3)], "one", 5, [("one", 0, 2), ("two", 2, 3), ("one", 3, 5)], "one"),
        ([("one", 3)], "two", 3, [("one", 0, 3)], "one"),  # it ended before a token was made with the new ones
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
    (reply,) = engine.submit("fake", "generation", [Submission(prompt=[1], params=parse_sampling({}), rid="x")])
    reply.weight_version, reply.versions, reply.tokens = label, former, [5] * tokens
    meta = Sequence(reply, [1], parse_sampling({}), engine.models[0], None).meta_info()
    assert meta["weight_version"] == shown
    named = meta.get("weight_versions")
    assert (named and [(span["version"], span["start"], span["end"]) for span in named]) == spans
