"""Values computed once for each served model."""

from __future__ import annotations

from typing import Any

import msgspec

from trunkline.core.server.api.per_model import PerModel
from trunkline.core.types import ServedModel


def served(name: str, *aliases: str) -> ServedModel:
    given: dict[str, Any] = dict.fromkeys(("model_path", "tokenizer_path", "dtype", "attention_backend"), "")
    return ServedModel(
        name=name, aliases=aliases, info=None, tasks={}, max_total_tokens=1, max_running_requests=1, **given
    )  # type: ignore[arg-type]  # fmt: skip


def test_a_value_is_made_once_and_again_after_an_update() -> None:
    made: list[ServedModel] = []
    values = PerModel(lambda model: made.append(model) or len(made))  # type: ignore[func-returns-value]
    first, other = served("a"), served("b")
    assert [values.get(model) for model in (first, first, other, first)] == [1, 1, 2, 1]
    updated = msgspec.structs.replace(first, name="new", aliases=("a",))
    assert [values.get(model) for model in (updated, other, updated)] == [3, 2, 3]
    assert set(values._known) == {"new", "b"}
