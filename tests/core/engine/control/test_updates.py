"""New weights in a running engine: all or nothing, and nobody sees a mixture of old and new."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.engine import startup
from trunkline.core.engine.contracts import CheckedStage
from trunkline.core.engine.control import update_loader, updates
from trunkline.core.engine.device.base import Memory
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.messages import Answer, Heartbeat, ModelsChanged
from trunkline.core.errors import RequestError
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.sources import catalogue, tensor_file
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.rerank.offline import rerank
from trunkline.plugins.reward.offline import classify

PROMPT = list(range(5, 60))
SUCCEEDED = "Succeeded to update model weights."
WEIGHTS = "model.safetensors"
COLLECT = updates.collect_garbage  # which the fixture of this name replaces


def start(*folders: Path, **options: Any) -> Engine:
    return Engine(*map(str, folders), dtype="float32", threads=1, **options)


def begin(engine: Engine, control: str, **arguments: Any) -> Future[Any]:
    """A control that is called; its answer comes when it comes."""

    async def call() -> Any:
        return await engine.client.call(control, **arguments)

    return engine.start(call())


def submit(engine: Engine, new: int = 12, **options: Any) -> Ticket:
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    return engine.submit("generation", PROMPT, params, **options)


def tokens(engine: Engine, **options: Any) -> list[int]:
    return submit(engine, **options).result(60).tokens


def logits(engine: Engine) -> torch.Tensor:
    """Of every position, from the engine's own model and head."""
    model = engine.client.transport.loop.lanes[0].model
    ids = torch.tensor(PROMPT)
    hidden = model.forward(ids, torch.arange(len(ids)), packed_layout([len(ids)]), None)
    result: torch.Tensor = model.heads["lm"](hidden)
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


@pytest.fixture
def broken(new: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the new checkpoint with something done to it."""

    def make(change: Callable[[Path], None]) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(new, folder)
        change(folder)
        return folder

    return make


# -- success ---------------------------------------------------------------------------------


def test_new_weights_are_those_of_a_fresh_engine(old: Path, new: Path) -> None:
    with start(new) as fresh:
        wanted, exact = tokens(fresh), logits(fresh)
    with start(old) as engine:
        before = tokens(engine)
        assert before != wanted
        assert submit(engine).result(60).cached_tokens == len(PROMPT) - 1  # the cache is hot
        replaced = weakref.ref(engine.client.transport.loop.lanes[0].model)
        answer = engine.call("update_weights", model_path=str(new), weight_version="seven")
        assert answer == {
            "success": True,
            "message": f"{SUCCEEDED} Weight version updated to seven.",
            "num_paused_requests": 0,
        }
        (lane,) = engine.client.transport.loop.lanes
        assert lane.scheduler._ledger._pool.free == lane.served.max_total_tokens  # the old prefixes hold nothing
        ticket = submit(engine).result(60)
        assert (ticket.tokens, ticket.cached_tokens) == (wanted, 0)
        assert submit(engine).result(60).cached_tokens == len(PROMPT) - 1
        assert torch.equal(logits(engine), exact)
        (served,) = engine.models
        assert (served.name, served.model_path, served.aliases) == (str(new), str(new), (str(old),))
        assert (served.tokenizer_path, served.weight_version) == (str(old), "seven")
        assert tokens(engine, model=str(old)) == wanted  # the old name still means it
        assert engine.encode("hello", str(old)) == engine.encode("hello", str(new))
        assert replaced() is None, "the old weights are still in memory"
        assert engine.call("update_weights", model_path=str(old))["message"] == SUCCEEDED
        assert tokens(engine) == before
        assert engine.models[0].aliases == (str(new),)
        assert engine.models[0].weight_version == "seven"


@pytest.mark.field
@pytest.mark.parametrize("shards_are_left", [False, True])
def test_a_single_file_saved_over_older_shards(old: Path, new: Path, tmp_path: Path, shards_are_left: bool) -> None:
    """The single file counts, as for transformers, at start and in updates."""
    folder = tmp_path / "saved"
    shutil.copytree(new, folder)
    name = "model-00001-of-00001.safetensors"
    if shards_are_left:
        shutil.copy(old / WEIGHTS, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(old / WEIGHTS), name)})
    )
    with start(new) as fresh, start(folder) as saved:
        wanted = tokens(fresh)
        assert tokens(saved) == wanted
    with start(old) as engine:
        assert tokens(engine) != wanted
        assert engine.call("update_weights", model_path=str(folder))["message"] == SUCCEEDED
        assert tokens(engine) == wanted


@pytest.mark.field
def test_the_tokenizer_path_of_a_demo_model_is_its_folder(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers and benchmarks load it. It stays when the weights are replaced."""
    monkeypatch.setattr(catalogue, "fetch", lambda reference: old)
    with Engine("demo:tiny", dtype="float32", threads=1) as engine:
        assert (engine.models[0].model_path, engine.models[0].tokenizer_path) == ("demo:tiny", str(old))
        engine.call("update_weights", model_path=str(new))
        assert (engine.models[0].model_path, engine.models[0].tokenizer_path) == (str(new), str(old))


def test_frozen_weights_are_freed_too(frozen: None, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server freezes what it has loaded, out of the collector's sight."""
    monkeypatch.setattr(updates, "collect_garbage", COLLECT)
    with start(old) as engine:
        replaced = weakref.ref(engine.client.transport.loop.lanes[0].model)
        gc.freeze()
        assert engine.call("update_weights", model_path=str(new))["success"]
        assert replaced() is None
        assert gc.get_freeze_count() > 0


def vectors(engine: Engine) -> np.ndarray:
    """Of two texts, one by one, see :func:`answers`."""
    return np.concatenate([encode(engine, [text]) for text in ("the first", "another text")])


@pytest.mark.parametrize("name", ["bert", "qwen3-base", "deberta"])
def test_vectors_after_an_update(zoo: Callable[[str], Path], other: Callable[[str], Path], name: str) -> None:
    with start(other(name)) as fresh:
        wanted = vectors(fresh)
    with start(zoo(name)) as engine:
        before = vectors(engine)
        assert np.abs(before - wanted).max() > 1e-3
        assert engine.call("update_weights", model_path=str(other(name)))["success"]
        assert np.array_equal(vectors(engine), wanted)


def answers(engine: Engine) -> list[Any]:
    """What the model says to its first task, one by one: which items share a pass is a race, and moves last bits."""
    task = next(iter(engine.models[0].tasks))
    if task == "rerank":
        return [rerank(engine, "the sea", [text])[0]["logit"] for text in ("one two", "there", "in it")]
    if task == "reward":
        return [classify(engine, [text])[0]["scores"] for text in ("one two", "the sea is there")]
    return tokens(engine)


@pytest.mark.parametrize(
    "name", ["bert-score", "bert-labels", "llama-score", "qwen3-yes-no", "mixtral", "phi3", "gpt2"]
)
def test_every_kind_of_model_can_be_updated(
    zoo: Callable[[str], Path], other: Callable[[str], Path], name: str
) -> None:
    with start(other(name)) as fresh, start(zoo(name)) as engine:
        before = answers(engine)
        assert engine.call("update_weights", model_path=str(other(name)))["message"] == SUCCEEDED
        updated = answers(engine)
        assert updated == answers(fresh)
        assert np.abs(np.subtract(updated, before)).max() > 1e-3
        ours, theirs = engine.client.transport.loop.lanes[0].model, fresh.client.transport.loop.lanes[0].model
        assert ours.fused == theirs.fused
        assert list(engine.models[0].tasks) == list(fresh.models[0].tasks)


# -- failures --------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00002.safetensors")
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Change a tensor, take it away (None), or add it."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        value = tensors.pop(name, torch.ones(3))
        if change is not None:
            tensors[name] = change(value).contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return edit


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else by the name of one of the checkpoint's files."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


NOT_OPENED = "Failed to update weights: .* is a pipe, a socket or a device, .*\nRolling back to original weights.$"
NORM = "model.layers.1.input_layernorm.weight"
FAULTS = {
    "truncated": (truncate, "Failed to update weights: .*is damaged"),
    "missing shard": (shard, "lists model-00002-of-00002.safetensors, which isn't there"),
    "wrong shape": (
        tensor("model.norm.weight", lambda value: value[:64]),
        r"Failed to update weights: Attempted to load weight \(torch.Size\(\[64\]\)\) "
        r"into parameter \(torch.Size\(\[128\]\)\): model.norm.weight.\nRolling back to original weights.$",
    ),
    "missing name": (tensor(NORM, None), f"lacks 1 of the tensors .*{NORM}"),
    "missing head": (tensor("lm_head.weight", None), "lacks 1 of the tensors .*lm_head.weight"),
    "extra name": (tensor("model.strange", lambda value: value), "no place for 1 .*model.strange"),
    "integers": (tensor(NORM, lambda value: value.to(torch.int8)), "is stored as int8"),
    "pickle": (pickled, "pytorch_model.bin, a pickle, which can run code"),
    "no weights": (empty, "Failed to get weights iterator: Cannot find any model weights with `.*broken`.$"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "another class": (config(architectures=["Qwen2ForCausalLM"]), "is a Qwen2ForCausalLM, the served model"),
    "other widths": (config(intermediate_size=96), r"Attempted to load weight \(torch.Size\(\[96, 128\]\)\)"),
    "fewer layers": (config(num_hidden_layers=1), "makes another model: num_hidden_layers is 1, not 2"),
    "a billion layers": (config(num_hidden_layers=10**9), "makes another model: num_hidden_layers is 1000000000"),
    "a billion experts": (config(num_experts=10**9), "makes another model: num_experts is 1000000000, not None"),
    "a billion labels": (config(num_labels=10**9), "has 1000000000 labels"),
    "a class that fills in": (
        config(num_hidden_layers=10**9, vocab_size=None, model_type="qwen3"),
        "num_hidden_layers is 1000000000",
    ),
    "no number of layers": (config(num_hidden_layers=None), "makes another model: num_hidden_layers is None, not 2"),
    "other parameters": (config(attention_bias=True), "makes another model: model.layers.0.self_attn.k_proj.bias is"),
    "words for numbers": (config(hidden_size="wide"), "Failed to update weights: .*Rolling back"),
    "no config but a list": (lambda folder: (folder / "config.json").write_text("[1]"), "must hold a JSON object"),
    "pipe": (replaced(WEIGHTS, os.mkfifo), NOT_OPENED),
    "pipe as config": (replaced("config.json", os.mkfifo), NOT_OPENED),
    "pipe as tokenizer": (replaced("tokenizer.json", os.mkfifo), NOT_OPENED),
    "device": (replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), NOT_OPENED),
    "device as config": (replaced("generation_config.json", lambda path: path.symlink_to("/dev/zero")), NOT_OPENED),
    "folder": (replaced(WEIGHTS, Path.mkdir), "Failed to update weights: .*can't be read: Is a directory"),
    "folder as config": (replaced("config.json", Path.mkdir), "can't be read: .*Is a directory"),
    "dangling link": (replaced(WEIGHTS, lambda path: path.symlink_to("x")), "can't be read: No such file"),
    "dangling link as config": (replaced("config.json", lambda path: path.symlink_to("x")), "has no config.json"),
    "shorter context": (config(max_position_embeddings=256), "was made for 256 tokens, but 512 are served"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_changes_nothing(engine: Engine, broken: Callable[..., Path], fault: str) -> None:
    change, words = FAULTS[fault]
    folder = broken(change)
    before, exact, served, model = (
        tokens(engine),
        logits(engine),
        engine.models,
        engine.client.transport.loop.lanes[0].model,
    )
    answer = engine.call("update_weights", model_path=str(folder), weight_version="bad", abort_all_requests=True)
    assert answer["success"] is False
    assert re.search(words, answer["message"], re.DOTALL), answer["message"]
    ticket = submit(engine).result(60)
    assert (ticket.tokens, ticket.cached_tokens) == (before, len(PROMPT) - 1)  # not even the cache
    assert torch.equal(logits(engine), exact)
    assert engine.models == served
    assert engine.client.transport.loop.lanes[0].model is model


def test_the_stages_of_refused_weights_are_closed(
    engine: Engine, broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[CheckedStage] = []
    monkeypatch.setattr(CheckedStage, "close", lambda stage: closed.append(stage))
    change, _ = FAULTS["extra name"]  # which is found when the model is complete
    assert engine.call("update_weights", model_path=str(broken(change)))["success"] is False
    (lane,) = engine.client.transport.loop.lanes
    assert {type(stage.stage) for stage in closed} == {type(stage.stage) for stage in lane.stages.values()}
    assert not set(closed) & set(lane.stages.values())


@pytest.mark.field
@pytest.mark.parametrize("hook", ["weights", "heads", "stages", "resolve_model"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_hook_that_exits_during_an_update_changes_nothing(
    engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch, hook: str, error: type[BaseException]
) -> None:
    def leave(*arguments: Any) -> Any:
        raise error

    before = tokens(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.host, hook, leave)
        assert engine.call("update_weights", model_path=str(new))["success"] is False
    assert tokens(engine) == before


@pytest.mark.field
def test_a_file_that_is_cut_short_while_it_is_read_changes_nothing(
    engine: Engine, broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a checkpoint is written again to the folder that is being loaded."""
    folder, before = broken(lambda folder: None), tokens(engine)

    def assemble(*arguments: Any) -> Any:
        stored_tensors = tensor_file.stored_tensors
        monkeypatch.setattr(
            tensor_file, "stored_tensors", lambda path: (stored_tensors(path), os.truncate(path, 4096))[0]
        )
        return startup.assemble(*arguments)

    monkeypatch.setattr(update_loader, "assemble", assemble)
    answer = engine.call("update_weights", model_path=str(folder))
    assert answer["success"] is False
    assert "model.safetensors changed while it was read" in answer["message"]
    assert tokens(engine) == before


@pytest.mark.parametrize(
    "reference",
    ["nobody/nothing", "nothing", "/no/such/folder", "demo:nothing", "", "a\0b", "~x/y", "x" * 5000, "a@b@c"],
)
def test_an_unknown_repository(engine: Engine, reference: str) -> None:
    answer = engine.call("update_weights", model_path=reference)
    message = f"Failed to get weights iterator: {reference} (repository not found)."
    assert answer == {"success": False, "message": message, "num_paused_requests": 0}


def test_formats_and_arguments(engine: Engine, new: Path) -> None:
    answer = engine.call("update_weights", model_path=str(new), load_format="dummy")
    assert answer["success"] is False
    assert answer["message"].startswith("Failed to get model loader: dummy.")
    with pytest.raises(RequestError, match="model_path"):
        engine.call("update_weights")
    with pytest.raises(RequestError, match="no model named"):
        engine.call("update_weights", model="other", model_path=str(new))


def test_too_little_memory_is_said_with_numbers(engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(engine)
    monkeypatch.setattr(CpuDevice, "memory", lambda _: Memory(1 << 40, 1000))
    message = engine.call("update_weights", model_path=str(new))["message"]
    assert "1000 bytes (0.00 GiB) of memory are free" in message
    size = sum(tensor.nbytes for tensor in load_file(new / WEIGHTS).values())
    stated = int(message.split("need ")[1].split(" bytes")[0])
    assert size <= stated < 1.1 * size
    assert tokens(engine) == before


def test_a_defect_while_loading_is_a_failure_like_others(
    engine: Engine, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(*_: Any) -> None:
        raise MemoryError("no room")

    before = tokens(engine)
    monkeypatch.setattr(update_loader, "assemble", assemble)
    message = engine.call("update_weights", model_path=str(new))["message"]
    assert message == "Failed to update weights: MemoryError: no room.\nRolling back to original weights."
    assert tokens(engine) == before


# -- where weights may come from -------------------------------------------------------------


def test_only_from_the_allowed_folder(old: Path, new: Path, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    shutil.copytree(new, allowed / "good")
    (allowed / "link").symlink_to(new)
    shutil.copytree(new, allowed / "inside")
    (allowed / "inside" / WEIGHTS).unlink()
    (allowed / "inside" / WEIGHTS).symlink_to(new / WEIGHTS)
    outside = [new, allowed / "link", allowed / "inside", allowed / "good" / ".." / ".." / "elsewhere", "owner/name"]
    shutil.copytree(new, tmp_path / "elsewhere")
    (tmp_path / "allowed-too").symlink_to(new)
    outside += [tmp_path / "allowed-too", "demo:smollm2-135m-instruct"]
    with start(old, allow_weights_dir=str(allowed)) as engine:
        before = tokens(engine)
        for path in outside:
            message = engine.call("update_weights", model_path=str(path))["message"]
            assert message == f"Failed to get weights iterator: {path} (repository not found)."
        assert tokens(engine) == before
        assert engine.call("update_weights", model_path=str(allowed / "good"))["success"]
        assert tokens(engine) != before


@pytest.mark.parametrize(
    ("names", "current", "kept"),
    [
        (["a", "b", "a"], "c", ["a", "b"]),
        (["a", "b"], "a", ["b"]),
        ([f"step-{n}" for n in range(1000)], "x", [f"step-{n}" for n in (*range(32), *range(968, 1000))]),
    ],
)
def test_former_names_are_remembered_within_bounds(names: list[str], current: str, kept: list[str]) -> None:
    assert update_loader.limit_aliases(names, current) == tuple(kept)


# -- running work ----------------------------------------------------------------------------


def test_running_requests_end_with_the_old_weights_and_later_ones_begin_with_the_new(old: Path, new: Path) -> None:
    with start(new) as fresh:
        wanted = tokens(fresh)
    with start(old) as engine:
        alone = tokens(engine, new=200)
        running = submit(engine, 200)
        next(iter(running))
        update = begin(engine, "update_weights", model_path=str(new), weight_version="one")
        later = [submit(engine) for _ in range(3)]
        dropped = submit(engine)
        dropped.cancel()
        again = begin(engine, "update_weight_version", new_version="two", abort_all_requests=False)
        assert running.result(60).tokens == alone
        assert update.result(60)["success"]
        assert [ticket.result(60).tokens for ticket in later] == [wanted] * 3
        labels = [ticket.reply.weight_version for ticket in (running, *later)]
        assert labels == ["default", *["two"] * 3]
        assert dropped.result(60).finish == {
            "type": "abort", "status_code": None, "err_type": None, "message": "Abort in waiting queue",
        }  # fmt: skip
        assert again.result(60)["success"]
        assert engine.models[0].weight_version == "two"


def test_abort_all_requests_ends_them_and_none_is_lost(old: Path, new: Path) -> None:
    with start(old, max_running_requests=2) as engine:
        tickets = [submit(engine, 400) for _ in range(4)]
        next(iter(tickets[0]))
        assert engine.call("update_weights", model_path=str(new), abort_all_requests=True)["success"]
        finishes = [ticket.result(60).finish or {} for ticket in tickets]
        assert {finish["type"] for finish in finishes} == {"abort"}
        assert tickets[0].reply.tokens
        assert tokens(engine)


def test_an_abort_does_not_wait_for_an_earlier_update(old: Path, new: Path) -> None:
    with start(old) as engine:
        running = submit(engine, 400)
        next(iter(running))
        update = begin(engine, "update_weights", model_path=str(new))
        held = submit(engine)
        (lane,) = engine.client.transport.loop.lanes
        while not engine.client.transport.loop.updates.deferred_requests(lane):
            time.sleep(0.001)
        assert engine.client.transport.loop.heartbeat().loads[0].waiting == 1
        label = begin(engine, "update_weight_version", new_version="two")
        assert (running.result(60).finish or {})["type"] == "abort"
        assert len(running.reply.tokens) < 400
        assert update.result(60)["success"]
        assert label.result(60)["success"]
        assert (held.result(60).finish or {})["type"] in ("length", "abort")
        assert engine.client.transport.loop.heartbeat().loads[0].waiting == 0


def test_a_new_label_ends_requests_unless_told_otherwise(engine: Engine) -> None:
    ticket = submit(engine, 300)
    answer = engine.call("update_weight_version", new_version="a", abort_all_requests=False)
    assert answer == {"success": True, "message": "Weight version updated to a", "new_version": "a"}
    assert ticket.result(60).finish == {"type": "length", "length": 300}
    ticket = submit(engine, 400)
    next(iter(ticket))
    engine.call("update_weight_version", new_version="default")
    assert (ticket.result(60).finish or {})["type"] == "abort"


def test_a_label_with_a_number_is_given_once(engine: Engine) -> None:
    """A replica that has followed the others already isn't told twice."""
    number = engine.models[0].label_number + 3
    engine.call("update_weight_version", new_version="third", label_number=number)
    ticket = submit(engine, 200)
    next(iter(ticket))
    for late in (number, number - 1):
        answer = engine.call("update_weight_version", new_version="late", label_number=late)
        assert answer["success"]
    assert ticket.result(60).finish == {"type": "length", "length": 200}
    assert (engine.models[0].weight_version, engine.models[0].label_number) == ("third", number)
    engine.call("update_weight_version", new_version="default")
    assert engine.models[0].label_number == number + 1


@pytest.mark.field
def test_loading_is_announced_to_the_watchdog_from_its_beginning_to_its_end(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(old) as engine:
        loop, sent = engine.client.transport.loop, []
        send = loop.channel.send
        monkeypatch.setattr(loop.channel, "send", lambda messages: (sent.extend(messages), send(messages)))
        during: list[Heartbeat] = []

        def assemble(*arguments: Any) -> Any:
            loop._busy_since -= 1000  # it takes long
            during.append(loop.heartbeat())
            return startup.assemble(*arguments)

        monkeypatch.setattr(update_loader, "assemble", assemble)
        assert engine.call("update_weights", model_path=str(new))["success"]
        assert during[0].age > 1000
        assert during[0].work == f"loading {str(new)!r} into {str(old)!r}"
        own = [beat for beat in sent if isinstance(beat, Heartbeat)]
        began = next(index for index, beat in enumerate(own) if beat.work)
        ended = next(index for index, beat in enumerate(own) if index > began and not beat.work)
        assert own[began].age < 100
        assert own[ended].age < 100  # the rest of the pass is watched again, from zero
        assert loop.heartbeat().work == ""
        kinds = [type(message) for message in sent]
        assert kinds.index(ModelsChanged) < kinds.index(Answer)


@pytest.mark.field
def test_a_load_that_fails_is_over_for_the_watchdog_too(old: Path, tmp_path: Path) -> None:
    with start(old) as engine:
        assert not engine.call("update_weights", model_path=str(tmp_path))["success"]
        assert engine.client.transport.loop.heartbeat().work == ""


def test_other_weights_are_another_key_space(old: Path, new: Path) -> None:
    with start(old) as engine:
        (lane,) = engine.client.transport.loop.lanes
        before = lane.namespace(b"salt")
        assert engine.call("update_weights", model_path="nothing")["success"] is False
        assert lane.namespace(b"salt") == before != lane.namespace(b"pepper")
        assert engine.call("update_weights", model_path=str(new))["success"]
        assert lane.namespace(b"salt") != before


# -- several models --------------------------------------------------------------------------


def test_one_of_two_models_is_updated_and_takes_no_name_from_the_other(
    zoo: Callable[[str], Path], old: Path, new: Path
) -> None:
    second = zoo("qwen2")
    with start(old, second) as engine:
        before = tokens(engine), tokens(engine, model=str(second))
        assert engine.call("update_weights", model_path=str(new))["success"]
        assert tokens(engine) != before[0]
        assert tokens(engine, model=str(second)) == before[1]
        answer = engine.call("update_weights", model=str(second), model_path=str(new))
        assert answer["success"] is False
        assert "is a LlamaForCausalLM, the served model a Qwen2ForCausalLM" in answer["message"]
        assert engine.call("update_weights", model=str(second), model_path=str(second))["success"]
        assert [served.name for served in engine.models] == [str(new), str(second)]
    with start(old, new) as engine:
        assert engine.call("update_weights", model_path=str(new))["success"]
        assert [(served.name, served.model_path) for served in engine.models] == [
            (str(old), str(new)),
            (str(new), str(new)),
        ]


# -- looking at weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gemma3", "phi3", "qwen2", "mixtral", "gpt2", "bert", "bert-score"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_back_by_their_names(zoo: Callable[[str], Path], name: str, dtype: str) -> None:
    folder = zoo(name)
    kind = getattr(torch, dtype)
    with Engine(str(folder), dtype=dtype, threads=1) as engine:
        assert name == "gpt2" or "2 of 2 layers fused" in engine.models[0].fused
        read, unused = 0, engine.client.transport.loop.lanes[0].model.unused
        for key, tensor in load_file(folder / WEIGHTS).items():
            if key in unused or "block_sparse_moe" in key:
                continue  # a pooler that nobody calls; experts, which transformers keeps in one tensor
            rows = engine.call("get_weights_by_name", name=key, truncate_size=20)
            assert torch.equal(torch.tensor(rows), tensor[:20].to(kind).float()), key
            read += 1
        assert read > 10


def test_weights_are_read_as_they_are_now_and_unknown_names_refused(old: Path, new: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with start(old) as engine:
        assert engine.call("update_weights", model_path=str(new))["success"]
        rows = engine.call("get_weights_by_name", name=name)
        assert torch.equal(torch.tensor(rows), load_file(new / WEIGHTS)[name][:100])
        for unknown in ("model.layers.1.qkv.weight", "model.layers.9.self_attn.k_proj.weight", "", "model", ".", "x.y"):
            with pytest.raises(RequestError, match="Get parameter by name failed"):
                engine.call("get_weights_by_name", name=unknown)
