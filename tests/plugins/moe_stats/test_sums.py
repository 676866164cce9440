"""Expert statistics of several engine replicas."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trunkline.core.types import current_replica
from trunkline.plugins.moe_stats.report import report
from trunkline.plugins.moe_stats.schemas import Snapshot
from trunkline.plugins.moe_stats.service import Service


class Replicas:
    """An engine client of two replicas, whose records differ."""

    replicas: tuple[str, ...] = ("a", "b")

    class Model:
        name = "m"
        aliases = ()

    models = (Model,)

    def replicas_of(self, model: str) -> tuple[str, ...]:
        assert model == "m"
        return self.replicas

    async def call(self, control: str, *, model: str) -> Any:
        mine = current_replica.get() == "a"
        counts = [[4, 0], [1, 3]] if mine else [[1, 1], [0, 2]]
        tokens = 4 if mine else 2
        return msgspec.to_builtins(Snapshot(
            model="m", mode="stat", recording=mine, passes=1, tokens=tokens, top_k=1, depth=3, experts=2,
            layers=[0, 2], counts=counts, unrecorded=2, file=f"{current_replica.get()}.pt",
        ))  # fmt: skip


async def test_the_sum_and_each() -> None:
    whole = report(await Service(Replicas()).run("experts_dump", None))  # type: ignore[arg-type]
    assert (whole["passes"], whole["tokens"], whole["recording"], whole["passes_without_record"]) == (2, 6, False, 4)
    assert [layer["counts"] for layer in whole["layers"]] == [[5, 1], [1, 5]]
    assert whole["balancedness"] == pytest.approx(6 / 2 / 5)
    assert "file" not in whole
    assert {name: one["file"] for name, one in whole["replicas"].items()} == {"a": "a.pt", "b": "b.pt"}
    assert [one["layers"][0]["counts"] for one in whole["replicas"].values()] == [[4, 0], [1, 1]]


async def test_without_replicas_it_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replicas, "replicas", ())
    only = report(await Service(Replicas()).run("experts_dump", None))  # type: ignore[arg-type]
    assert (only["tokens"], only["file"]) == (2, "None.pt")
    assert "replicas" not in only
