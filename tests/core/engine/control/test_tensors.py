"""Tensors that are sent replace those of a model, some or all of them, and nothing else."""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trunkline.core import Engine
from trunkline.core.engine.control.tensors import OpenFile
from trunkline.core.model.attention import packed_layout
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.rerank.offline import rerank

PROMPT = list(range(5, 60))
WEIGHTS = "model.safetensors"


def start(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), **{"dtype": "float32", "threads": 1, **options})


def send(engine: Engine, folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """Update from a file that is gone right afterwards, as the server does."""
    path = folder / "sent.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    answer: dict[str, Any] = engine.call("update_weights_from_tensor", path=str(path), **options)
    path.unlink()
    return answer


def tokens(engine: Engine) -> list[int]:
    params = GenerationParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    return engine.submit("generation", PROMPT, params).result(60).tokens


def hidden(engine: Engine) -> torch.Tensor:
    model = engine.client.transport.loop.lanes[0].model
    ids = torch.tensor(PROMPT)
    result: torch.Tensor = model.forward(ids, torch.arange(len(ids)), packed_layout([len(ids)]), None)
    return result


@pytest.fixture
def old(zoo: Callable[[str], Path]) -> Path:
    return zoo("llama")


@pytest.fixture
def new(other: Callable[[str], Path]) -> Path:
    return other("llama")


@pytest.fixture(scope="module")
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    """One for all tests that fail to change it."""
    with start(zoo("llama")) as engine:
        yield engine


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "phi3", "bert", "bert-score", "qwen3-base"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_tensors_make_the_model_of_a_fresh_engine(
    zoo: Callable[[str], Path], other: Callable[[str], Path], tmp_path: Path, name: str, dtype: str
) -> None:
    with start(other(name), dtype=dtype) as fresh:
        wanted = hidden(fresh)
        scores = rerank(fresh, "the sea", ["one two"]) if name == "bert-score" else None
    with start(zoo(name), dtype=dtype) as engine:
        before = hidden(engine)
        answer = send(engine, tmp_path, load_file(other(name) / WEIGHTS), weight_version="two")
        assert answer == {"success": True, "message": "Success Weight version updated to two."}
        assert torch.equal(hidden(engine), wanted)
        assert not torch.equal(before, wanted)
        if scores is not None:  # of a head in float32, whatever the model is
            assert rerank(engine, "the sea", ["one two"])[0]["logit"] == scores[0]["logit"]
        (served,) = engine.models
        assert (served.name, served.model_path, served.weight_version) == (str(zoo(name)), str(zoo(name)), "two")


def test_a_model_in_buckets(old: Path, new: Path, tmp_path: Path) -> None:
    """As trainers send it: some tensors at a time. What isn't sent stays, whoever sent it before."""
    tensors = load_file(new / WEIGHTS)
    names = sorted(tensors)
    with start(new) as fresh:
        wanted = tokens(fresh)
    with start(old) as engine:
        assert send(engine, tmp_path, {name: tensors[name] for name in names[::3]}) == {
            "success": True, "message": "Success",
        }  # fmt: skip
        half = tmp_path / "half"
        shutil.copytree(old, half)
        save_file(load_file(old / WEIGHTS) | {name: tensors[name] for name in names[::3]}, half / WEIGHTS)
        with start(half) as mixed:
            assert torch.equal(hidden(mixed), hidden(engine))
        for index in (1, 2):
            assert send(engine, tmp_path, {name: tensors[name] for name in names[index::3]})["success"]
        assert tokens(engine) == wanted
        assert engine.models[0].weight_version == "default"
        lane = engine.client.transport.loop.lanes[0]
        assert lane.settings.weight_version == "default"
        assert engine.call("update_weights", model_path=str(old))["success"]
        assert not lane.served.weights_sent
        assert tokens(engine) != wanted


def test_names_of_a_state_dict(zoo: Callable[[str], Path], other: Callable[[str], Path], tmp_path: Path) -> None:
    """Trainers send what ``model.state_dict()`` has: tied tensors twice, and prefixes that files lack."""
    for name in ("llama-tied", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(other(name), dtype=torch.float32)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert state.keys() != load_file(zoo(name) / WEIGHTS).keys()
        with start(other(name)) as fresh, start(zoo(name)) as engine:
            assert send(engine, tmp_path, state)["message"] == "Success"
            assert torch.equal(hidden(engine), hidden(fresh))
            assert tokens(engine) == tokens(fresh)


def test_a_tied_head_alone_means_the_embeddings(
    zoo: Callable[[str], Path], other: Callable[[str], Path], tmp_path: Path
) -> None:
    embeddings = load_file(other("llama-tied") / WEIGHTS)["model.embed_tokens.weight"]
    with start(zoo("llama-tied")) as engine, start(zoo("llama-tied")) as same:
        assert send(engine, tmp_path, {"lm_head.weight": embeddings})["success"]
        assert send(same, tmp_path, {"model.embed_tokens.weight": embeddings})["success"]
        assert torch.equal(hidden(engine), hidden(same))


def test_labels_and_what_a_restarted_engine_would_have(old: Path, new: Path, tmp_path: Path) -> None:
    with start(old, weight_version="disk") as engine:
        (lane,) = engine.client.transport.loop.lanes
        send(engine, tmp_path, load_file(new / WEIGHTS), weight_version="sent")
        assert (lane.served.weight_version, lane.settings.weight_version) == ("sent", "disk")
        engine.call("update_weight_version", new_version="renamed")
        assert (engine.models[0].weight_version, lane.settings.weight_version) == ("renamed", "disk")
        send(engine, tmp_path, {"model.norm.weight": load_file(old / WEIGHTS)["model.norm.weight"]})
        assert (engine.models[0].weight_version, lane.settings.weight_version) == ("renamed", "disk")
        engine.call("update_weights", model_path=str(new))  # these are on disk, and the label stays
        assert (engine.models[0].weight_version, lane.settings.weight_version) == ("renamed", "renamed")


def test_files_are_let_go_with_their_tensors(old: Path, new: Path, tmp_path: Path) -> None:
    def held() -> int:
        gc.collect()
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd != "0"
                 if os.path.islink(f"/proc/self/fd/{fd}")]  # fmt: skip
        return sum("sent.safetensors" in link for link in links)

    tensors = load_file(new / WEIGHTS)
    with start(old) as engine:
        send(engine, tmp_path, tensors)
        assert held() == 1
        send(engine, tmp_path, {"model.norm.weight": tensors["model.norm.weight"]})
        assert held() == 2
        send(engine, tmp_path, tensors)
        assert held() == 1
        send(engine, tmp_path, {"nothing": torch.ones(1)})
        assert held() == 1
        engine.call("update_weights", model_path=str(old))
        assert held() == 0


def test_a_checkpoint_that_changed_on_disk_is_not_mixed_in(old: Path, new: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(old, folder)
    tensors = load_file(new / WEIGHTS)
    with start(folder) as engine:
        before = tokens(engine)
        shutil.copy(new / WEIGHTS, folder / WEIGHTS)
        answer = send(engine, tmp_path, {"model.norm.weight": tensors["model.norm.weight"]})
        assert not answer["success"]
        assert "changed while it was read" in answer["message"]
        assert tokens(engine) == before
        (folder / WEIGHTS).unlink()
        assert send(engine, tmp_path, tensors)["success"]  # all are there: none is read from the folder
        assert tokens(engine) != before


def test_vectors_of_tensors(zoo: Callable[[str], Path], other: Callable[[str], Path], tmp_path: Path) -> None:
    with start(other("bert")) as fresh, start(zoo("bert")) as engine:
        assert send(engine, tmp_path, load_file(other("bert") / WEIGHTS))["success"]
        assert (encode(engine, ["the sea"])[0] == encode(fresh, ["the sea"])[0]).all()


def test_running_requests_end_with_the_old_tensors(old: Path, new: Path, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    shutil.copy(new / WEIGHTS, path)
    with start(old) as engine:
        alone = tokens(engine)
        params = GenerationParams(max_new_tokens=300, temperature=0, ignore_eos=True)
        running = engine.submit("generation", PROMPT, params)
        next(iter(running))
        assert engine.call("update_weights_from_tensor", path=str(path), weight_version="two")["success"]
        assert running.done
        assert (running.reply.tokens[:12], running.reply.weight_version) == (alone, "default")
        running = engine.submit("generation", PROMPT, params)
        next(iter(running))
        engine.call("pause", mode="in_place")
        assert engine.call("update_weights_from_tensor", path=str(path), weight_version="three")["success"]
        assert not running.done
        engine.call("continue")
        assert [label for label, _ in running.result(60).versions] == ["two"]
        running = engine.submit("generation", PROMPT, params)
        next(iter(running))
        assert engine.call("update_weights_from_tensor", path=str(path), abort_all_requests=True)["success"]
        assert (running.result(60).finish or {})["type"] == "abort"


NORM = "model.layers.1.input_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "unknown name": (lambda given: {"model.strange": torch.ones(3)}, "model.strange is none of the checkpoint's"),
    "name of a merged matrix": (
        lambda given: {"model.layers.0.self_attn.qkv_proj.weight": torch.ones(3)}, "is none of the checkpoint's",
    ),
    "wrong shape": (
        lambda given: {NORM: torch.ones(7)},
        rf"Attempted to load weight \(torch.Size\(\[7\]\)\) into parameter \(torch.Size\(\[128\]\)\): {NORM}.\n",
    ),
    "integers": (lambda given: {NORM: given[NORM].to(torch.int8)}, "is stored as int8"),
    "one tensor twice": (
        lambda given: {NORM: given[NORM], NORM.removeprefix("model."): given[NORM].clone()}, "are the same tensor",
    ),
    "nothing": (lambda given: {}, "has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_changes_nothing(engine: Engine, new: Path, tmp_path: Path, fault: str) -> None:
    make, words = FAULTS[fault]
    before, exact, model = tokens(engine), hidden(engine), engine.client.transport.loop.lanes[0].model
    answer = send(engine, tmp_path, make(load_file(new / WEIGHTS)), weight_version="bad", abort_all_requests=True)
    assert answer["success"] is False
    assert answer.keys() == {"success", "message"}
    assert re.search(words, answer["message"]), answer["message"]
    assert tokens(engine) == before
    assert torch.equal(hidden(engine), exact)
    assert engine.client.transport.loop.lanes[0].model is model
    assert engine.models[0].weight_version == "default"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no safetensors file: the file is damaged (it has no header)."),
        (b"\x80\x04\x95pickle", "is no safetensors file: the file is damaged"),
        (b"\x08\0\0\0\0\0\0\0not json", "is no safetensors file: the file is damaged"),
    ],
)
def test_other_files(engine: Engine, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    answer = engine.call("update_weights_from_tensor", path=str(tmp_path / "x"))
    assert answer["success"] is False
    assert words in answer["message"]
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (("pipe", "not a regular file"), ("nothing", "No such file")):
        began = time.monotonic()
        assert reason in engine.call("update_weights_from_tensor", path=str(tmp_path / path))["message"]
        assert time.monotonic() - began < 10


def test_only_folders_where_the_operator_says_so(old: Path, new: Path, tmp_path: Path) -> None:
    with start(old, allow_weights_dir=str(tmp_path)) as engine:
        answer = send(engine, tmp_path, load_file(new / WEIGHTS))
        assert "(--allow-weights-dir)" in answer["message"]
        assert answer["success"] is False


def test_the_limit_has_room_for_all_tensors(engine: Engine, new: Path) -> None:
    limit = engine.call("tensor_limit")
    assert limit > 2 * os.path.getsize(new / WEIGHTS)


def test_a_file_is_closed_with_its_object(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = OpenFile(path)
    path.unlink()
    assert file.path.read_bytes() == b"content"
    alias = file.path
    del file
    assert not alias.exists()
