"""Memory that is given back and taken again: answers stay the same, bit for bit, and nobody computes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.engine.control import occupation
from trunkline.core.engine.control.pages import pages_of, tensors_of, total_bytes
from trunkline.core.engine.lane import Lane
from trunkline.core.errors import RequestError
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.rerank.offline import rerank
from trunkline.plugins.reward.offline import classify

PROMPT = list(range(5, 60))
WEIGHTS = "model.safetensors"


def start(*folders: Path, **options: Any) -> Engine:
    return Engine(*map(str, folders), **{"dtype": "float32", "threads": 1, **options})


def submit(engine: Engine, new: int = 12, **options: Any) -> Ticket:
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    return engine.submit("generation", PROMPT, params, **options)


def lanes(engine: Engine) -> list[Lane]:
    found: list[Lane] = engine.client.transport.loop.lanes
    return found


def answers(engine: Engine) -> list[Any]:
    """What the model says to its first task, exactly."""
    task = next(iter(engine.models[0].tasks))
    if task == "rerank":
        return [rerank(engine, "the sea", [text])[0]["logit"] for text in ("one two", "there", "in it")]
    if task == "reward":
        return [classify(engine, [text])[0]["scores"] for text in ("one two", "the sea is there")]
    if task == "embedding":
        return [encode(engine, [text])[0].tolist() for text in ("one two", "the sea is there")]
    return submit(engine, 40).result(60).tokens


@pytest.fixture
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with start(zoo("llama")) as engine:
        yield engine


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: scratch memory may hold NaN, which isn't equal to itself."""
    return tensor.reshape(-1).view(torch.uint8)


NAMES = ["llama", "llama-tied", "gpt2", "mixtral", "phi3", "qwen3-base", "bert", "bert-score", "llama-score", "deberta"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_answers_after_a_resume(zoo: Callable[[str], Path], name: str, dtype: str) -> None:
    with start(zoo(name), dtype=dtype) as engine:
        (lane,) = lanes(engine)
        before = answers(engine)
        pool = lane.runner.pool
        slots = {one.data_ptr() for one in (() if pool is None else (*pool.keys, *pool.values))}
        tensors = [one for one in tensors_of(lane.model) if not one.is_mkldnn and one.data_ptr() not in slots]
        kept = [one.clone() for one in tensors]
        engine.call("release_memory")
        assert lane.released == {"weights", "kv_cache"}
        large = [
            (one, copy)
            for one, copy in zip(tensors, kept, strict=True)
            if copy.count_nonzero() > 0.5 * copy.numel()
            and total_bytes(pages_of([one])) > 0.5 * one.untyped_storage().nbytes()
        ]
        assert large
        there = [one.shape for one, copy in large if torch.equal(one, copy)]
        assert there == [], "it is still there"
        engine.call("resume_memory")
        changed = [one.shape for one, copy in zip(tensors, kept, strict=True) if not torch.equal(bits(one), bits(copy))]
        assert changed == []
        assert answers(engine) == before
        assert lane.saved_weights is None


@pytest.mark.parametrize("tags", [["weights"], ["kv_cache"], ["kv_cache", "weights"], []])
def test_requests_wait_until_all_that_was_released_is_there(engine: Engine, tags: list[str]) -> None:
    (lane,) = lanes(engine)
    wanted = submit(engine).result(60).tokens
    engine.call("release_memory", tags=tags)
    engine.call("release_memory", tags=tags)  # once more changes nothing
    ticket = submit(engine)
    time.sleep(0.1)
    assert not ticket.done
    assert engine.call("probe") == {"type": "halted"}
    for tag in tags or ["weights", "kv_cache"]:
        assert not ticket.done
        engine.call("resume_memory", tags=[tag])
    assert ticket.result(60).tokens == wanted
    # Keys and values of the same weights outlive these, but not their own memory.
    assert ticket.reply.cached_tokens == (len(PROMPT) - 1 if tags == ["weights"] else 0)
    assert lane.released == frozenset()
    engine.call("resume_memory")  # harmless


def test_nothing_is_released_while_a_request_runs(engine: Engine) -> None:
    (lane,) = lanes(engine)
    alone = submit(engine, 300).result(60).tokens
    ticket = submit(engine, 300)
    next(iter(ticket))
    words = "release_memory_occupation should be called only when server is idle."
    with pytest.raises(RequestError, match=words) as caught:
        engine.call("release_memory")
    assert caught.value.status == 400
    engine.call("pause", mode="in_place")
    with pytest.raises(RequestError, match=words):
        engine.call("release_memory")
    engine.call("pause", mode="retract")  # now it waits, and holds nothing
    engine.call("release_memory")
    engine.call("continue")
    time.sleep(0.1)
    assert not ticket.done
    assert lane.released
    engine.call("resume_memory")
    assert ticket.result(60).tokens == alone


def test_all_models_or_none(zoo: Callable[[str], Path]) -> None:
    second = zoo("qwen2")
    with start(zoo("llama"), second) as engine:
        first_lane, second_lane = lanes(engine)
        wanted = submit(engine, model=str(second)).result(60).tokens
        ticket = submit(engine, 400, model=str(second))
        next(iter(ticket))
        with pytest.raises(RequestError, match="idle"):
            engine.call("release_memory", all_models=True)
        assert not first_lane.released
        engine.call("release_memory")  # the first alone: the second goes on with what is its own
        assert (bool(first_lane.released), bool(second_lane.released)) == (True, False)
        assert ticket.result(60).tokens[:12] == wanted
        engine.call("release_memory", all_models=True)
        assert second_lane.released
        engine.call("resume_memory", all_models=True)
        assert submit(engine, model=str(second)).result(60).tokens == wanted
        assert submit(engine).result(60).tokens


def test_an_update_brings_weights_back(engine: Engine, other: Callable[[str], Path], tmp_path: Path) -> None:
    (lane,) = lanes(engine)
    with start(other("llama")) as fresh:
        wanted = submit(fresh).result(60).tokens
    engine.call("release_memory")
    with pytest.raises(RequestError, match="/resume_memory_occupation"):
        engine.call("get_weights_by_name", name="model.norm.weight")
    assert not engine.call("update_weights", model_path=str(tmp_path))["success"]
    assert lane.released == {"weights", "kv_cache"}
    waiting = submit(engine)
    assert engine.call("update_weights", model_path=str(other("llama")))["success"]
    assert lane.released == {"kv_cache"}
    assert lane.saved_weights is None
    rows = engine.call("get_weights_by_name", name="model.norm.weight")
    assert rows == load_file(other("llama") / WEIGHTS)["model.norm.weight"][:100].tolist()
    engine.call("resume_memory", tags=["weights"])  # not the old ones, which are nowhere any more
    assert not waiting.done
    engine.call("resume_memory", tags=["kv_cache"])
    assert waiting.result(60).tokens == wanted


@pytest.mark.parametrize("how", ["disk", "system"])
def test_a_release_that_fails_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def fail(pages: Any, *_: Any) -> Any:
        if how == "system":
            release_pages(pages[:3])
        raise OSError(28, "No space left")

    release_pages = occupation.release_pages
    wanted = submit(engine).result(60).tokens
    with monkeypatch.context() as patch:
        patch.setattr(occupation, "SavedPages" if how == "disk" else "release_pages", fail)
        with pytest.raises(RequestError, match="No space left") as caught:
            engine.call("release_memory")
    assert caught.value.status == 400
    assert not lanes(engine)[0].released
    assert submit(engine).result(60).tokens == wanted


def test_other_systems_say_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupation, "supported", lambda: False)
    with pytest.raises(RequestError, match="only on Linux"):
        engine.call("release_memory")
    assert submit(engine).result(60).tokens


def test_unknown_tags(engine: Engine) -> None:
    with pytest.raises(RequestError, match="tags"):
        engine.call("release_memory", tags=["graphs"])
    assert submit(engine).result(60).tokens
