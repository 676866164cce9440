"""Random schedules for the deterministic mode: requests together, in chunks, from the cache, paused and retracted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from msgspec import structs

from trunkline.core import Engine
from trunkline.core.testing import build_checkpoint
from trunkline.core.types import Submission
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams, Grammar, LogprobParams
from trunkline.plugins.rerank.schemas import RerankParams
from trunkline.plugins.reward.schemas import RewardParams

from .device.storms import COMMON, answer

LONG_ROPE = "phi3-long-rope"  # see long_rope
BOUNDARY = 64  # tokens, beyond which its rotary frequencies change
TASK_OF = {
    **dict.fromkeys(("llama", "qwen3-moe", "mistral-sliding", "gemma2", "gpt-oss", "gpt2", LONG_ROPE), "generation"),
    **dict.fromkeys(("bert", "roberta", "qwen3-base", "mistral-base"), "embedding"),
    "bert-score": "rerank",
    "llama-score": "reward",
}
MODELS = (
    "llama",
    "qwen3-moe",
    LONG_ROPE,
    "mistral-sliding",
    "bert",
    "roberta",
    "qwen3-base",
    "bert-score",
    "llama-score",
)
ALONE: dict[str, Any] = {"disable_radix_cache": True, "chunked_prefill_size": -1}
# Prompts are divided, the longest requests leave little room for others, and the cache is evicted.
TOGETHER: dict[str, Any] = {"chunked_prefill_size": 16, "max_total_tokens": 240}
ITEMS = {"type": "array", "items": {"enum": ["a", "bc", 7, None]}}
GRAMMARS = (Grammar("regex", "(a|bc|[0-9 ])*!"), Grammar("json_schema", json.dumps(ITEMS)))
OWN: dict[str, Any] = {"embedding": EmbeddingParams, "rerank": RerankParams, "reward": RewardParams}

Asked = tuple[int, Submission]  # index of the model, what is submitted


@dataclass(frozen=True)
class Schedule:
    """Requests, the sizes of the groups in which they are submitted, and the pauses between groups."""

    asked: Sequence[Asked]
    groups: Sequence[int]
    pauses: Sequence[tuple[str, int]]  # mode, index of the model


def long_rope(folder: Path) -> Path:
    """Write a checkpoint whose requests get other rotary frequencies when they are longer than :data:`BOUNDARY`."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * number for number in range(16)],
        "long_factor": [2.0 + 0.4 * number for number in range(16)],
        "original_max_position_embeddings": BOUNDARY,
    }
    return build_checkpoint("phi3", folder, rope_parameters=rope, original_max_position_embeddings=BOUNDARY)


def schedules(models: Sequence[str]) -> st.SearchStrategy[Schedule]:
    """Any schedule of requests for these models."""
    ids = st.integers(4, 499)
    prompts = st.builds(
        lambda end, rest: COMMON[:end] + rest, st.integers(0, 30), st.lists(ids, min_size=2, max_size=60)
    )
    params = st.builds(
        GenerationParams,
        max_new_tokens=st.integers(0, 30),
        temperature=st.sampled_from([0.0, 0.9]),
        top_p=st.sampled_from([1.0, 0.7]),
        seed=st.integers(0, 9),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        logit_bias=st.sampled_from([(), ((7, 2.0), (9, -1.0))]),
        logprobs=st.sampled_from([LogprobParams(start=0, top=3), LogprobParams(top=3)]),
        ignore_eos=st.just(True),
        grammar=st.sampled_from([None, None, *GRAMMARS]),
    )

    def asked(index: int, prompt: list[int], generation: GenerationParams) -> Asked:
        made = OWN.get(TASK_OF[models[index]])
        return index, Submission(prompt=prompt, params=generation if made is None else made(), rid="")

    return st.builds(
        Schedule,
        st.lists(st.builds(asked, st.integers(0, len(models) - 1), prompts, params), min_size=2, max_size=16),
        st.lists(st.integers(1, 8), max_size=6),
        st.lists(st.tuples(st.sampled_from(["retract", "in_place"]), st.integers(0, 9)), max_size=4),
    )


@contextmanager
def engines(folders: Sequence[Path], dtype: str, *, threads: int = 2, **others: Any) -> Iterator[tuple[Engine, Engine]]:
    """One engine in which each request is alone, cold and undivided, and one that computes requests together."""
    before = torch.get_num_threads()
    options: dict[str, Any] = {"dtype": dtype, "threads": threads, "enable_deterministic_inference": True, **others}
    paths = [str(folder) for folder in folders]
    try:
        with Engine(*paths, **options, **ALONE) as alone, Engine(*paths, **options, **TOGETHER) as together:
            yield alone, together
    finally:
        torch.set_num_threads(before)


def submit(engine: Engine, models: Sequence[str], number: int, asked: Asked) -> Any:
    index, item = asked
    name = engine.client.models[index].name
    return engine.submit_all(TASK_OF[models[index]], [structs.replace(item, rid=f"{number}")], model=name)[0]


def bits(ticket: Any) -> Any:
    """Tokens, finish reason and the bytes of all numbers of a reply."""
    tokens, finish, numbers = answer(ticket)
    return tokens, finish, {name: array.tobytes() for name, array in numbers.items()}


def run(alone: Engine, together: Engine, models: Sequence[str], schedule: Schedule) -> None:
    """Run a schedule; AssertionError unless each result has the bits of the same request alone."""
    expected = [bits(submit(alone, models, number, asked)) for number, asked in enumerate(schedule.asked)]
    tickets: list[Any] = []
    waiting = list(enumerate(schedule.asked))
    groups, pauses = list(schedule.groups), list(schedule.pauses)
    while waiting:
        size = groups.pop() if groups else len(waiting)
        tickets += [submit(together, models, number, asked) for number, asked in waiting[:size]]
        waiting = waiting[size:]
        if pauses:
            mode, index = pauses.pop()
            name = together.client.models[index % len(models)].name
            time.sleep(0.002)
            together.call("pause", model=name, mode=mode)
            together.call("continue", model=name)
    for number, (ticket, same) in enumerate(zip(tickets, expected, strict=True)):
        found = bits(ticket)
        assert found == same, f"request {number} of {models[schedule.asked[number][0]]} has other bits alone"
