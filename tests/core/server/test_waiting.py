"""How many prompt tokens may wait for a model."""

from __future__ import annotations

import pytest

from trunkline.core.config import ServerSettings
from trunkline.core.errors import RequestError
from trunkline.core.server.waiting import FALLBACK_POOL, QUEUE_POOLS, WaitingRoom
from trunkline.core.types import ModelInfo, ServedModel, Submission


def served(causal: bool) -> ServedModel:
    info = ModelInfo(
        path="", architecture="A", model_type="a", context_length=64, vocab_size=9, hidden_size=4, causal=causal
    )
    names = dict.fromkeys(("name", "model_path", "tokenizer_path", "dtype", "attention_backend"), "m")
    return ServedModel(info=info, tasks={}, max_total_tokens=64, max_running_requests=1, **names)


@pytest.mark.parametrize(("causal", "limit"), [(True, QUEUE_POOLS * 64), (False, QUEUE_POOLS * FALLBACK_POOL)])
def test_the_tokens_of_one_pass_are_no_pool(causal: bool, limit: int) -> None:
    room = WaitingRoom(ServerSettings())
    room.check(served(causal), "m", [Submission(prompt=[1] * limit, params=None, rid="")])
    with pytest.raises(RequestError, match=rf"the limit is {limit} \(--max-queued-tokens\)"):
        room.check(served(causal), "m", [Submission(prompt=[1] * (limit + 1), params=None, rid="")])
