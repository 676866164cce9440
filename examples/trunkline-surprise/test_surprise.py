"""The task without HTTP: ``pytest -p trunkline.core.testing``, where trunkline and this package are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trunkline_surprise import TASK
from trunkline_surprise.stage import SurpriseParams

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient, Submission


async def bits(client: EngineClient, text: str) -> float:
    model = client.choose(TASK, None)
    [prompt] = await client.tokenize(model.name, [text])
    [reply] = client.submit(model.name, TASK, [Submission(prompt=prompt, params=SurpriseParams(), rid="test")])
    await reply.result()
    data: dict[str, Any] = reply.data
    return float(data["bits"])


def test_a_result_does_not_depend_on_chunks(zoo: Callable[[str], Path]) -> None:
    results = []
    for chunk in (-1, 4):
        with Engine(str(zoo("qwen2")), dtype="float32", chunked_prefill_size=chunk) as engine:
            results.append(engine.run(bits(engine.client, "the sea and the rain in the house on the shore")))
            with pytest.raises(RequestError):
                engine.run(bits(engine.client, ""))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] > 0
