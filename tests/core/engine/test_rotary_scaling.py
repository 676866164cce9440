"""Rotary scaling that depends on the length: each request gets what transformers gives to it alone.

The expected tokens are those of uncached forward passes of transformers over the request's own
sequence, one per step, in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trunkline.core import Engine
from trunkline.core.cache.ledger import SlotAllocation
from trunkline.core.engine.scheduling.scheduler import Scheduler
from trunkline.core.errors import ModelError
from trunkline.core.model import rotary
from trunkline.core.testing import build_checkpoint
from trunkline.core.types import Submission
from trunkline.plugins.generation.schemas import GenerationParams

pytestmark = pytest.mark.field

NEW = 10  # tokens
GAP = 1e-3  # between the best two logits: closer ones may swap
BOUNDARY = 128  # tokens


def long_rope(heads_width: int = 16) -> dict[str, Any]:
    """LongRoPE parameters whose two sets of factors give very different frequencies."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(heads_width)],
        "long_factor": [2.0 + 0.4 * i for i in range(heads_width)],
        "original_max_position_embeddings": BOUNDARY,
    }


CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": long_rope()}),
    "phi3": ("phi3", {"rope_parameters": long_rope(), "original_max_position_embeddings": BOUNDARY}),
    "gemma3": (  # one kind of layer has two sets of factors, the other has one
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": long_rope(),
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, overrides = CHECKPOINTS[request.param]
    return build_checkpoint(name, tmp_path_factory.mktemp("rotary") / request.param, **overrides)


def prompts() -> dict[str, list[int]]:
    """Below the boundary, above it, and one that crosses it while it generates. All begin alike."""
    draw = torch.Generator().manual_seed(5)
    long: list[int] = torch.randint(4, 500, (301,), generator=draw).tolist()
    return {"short": long[:41], "long": long, "crossing": long[: BOUNDARY - NEW // 2]}


@cache
def expected(path: Path) -> dict[str, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    found = {}
    for name, prompt in prompts().items():
        ids = list(prompt)
        for _ in range(NEW):
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] > GAP, "choose another seed: the greedy choice isn't clear"
            ids.append(int(logits.argmax()))
        found[name] = ids[len(prompt) :]
    return found


def start(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), dtype="float32", threads=1, **{"max_total_tokens": 2048, **options})


def generate(engine: Engine, *names: str) -> list[list[int]]:
    """The tokens of these prompts, submitted at once."""
    params = GenerationParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    given = prompts()
    items = [Submission(prompt=given[name], params=params, rid=str(index)) for index, name in enumerate(names)]
    tickets = engine.submit_all("generation", items)
    return [ticket.result(120).tokens for ticket in tickets]


@pytest.mark.parametrize("backend", ["cpu", "torch_native"])
@pytest.mark.parametrize("chunk", [-1, 64, 7])
def test_neither_the_batch_nor_the_chunks_matter(folder: Path, backend: str, chunk: int) -> None:
    truth = expected(folder)
    with start(folder, attention_backend=backend, chunked_prefill_size=chunk) as engine:
        for names in (["short", "long", "crossing"], ["long", "crossing"]):
            assert generate(engine, *names) == [truth[name] for name in names]
            assert engine.call("flush_cache") is True


@pytest.mark.parametrize("names", [["long", "short", "crossing"], ["crossing", "long", "short"], ["short", "crossing"]])
def test_the_cache_does_not_matter(folder: Path, names: list[str]) -> None:
    truth = expected(folder)
    with start(folder) as engine:
        for name in (*names, *names):
            assert generate(engine, name) == [truth[name]]


def test_each_regime_has_its_own_cache(folder: Path) -> None:
    params = GenerationParams(max_new_tokens=1, temperature=0.0)
    given = prompts()
    with start(folder) as engine:

        def cached(name: str) -> int:
            return engine.submit("generation", given[name], params).result(120).cached_tokens

        assert [cached("long"), cached("short")] == [0, 0]
        assert [cached("long"), cached("short")] == [300, 40]
        assert cached("crossing") == 41  # the short prompt and no more


def test_a_pool_without_room_for_all_does_not_matter(folder: Path) -> None:
    truth = expected(folder)
    names = ["crossing", "long", "crossing", "short", "crossing"]
    with start(folder, max_total_tokens=340, chunked_prefill_size=32) as engine:
        assert generate(engine, *names) == [truth[name] for name in names]


def test_the_verification_at_load_covers_the_long_regime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(self: Any, lengths: Any) -> None:
        self._embeddings = []  # so that transformers chooses per pass

    original = rotary.RotaryRegimes.for_lengths
    monkeypatch.setattr(
        rotary.RotaryRegimes, "for_lengths", lambda self, lengths: (ignore(self, lengths), original(self, lengths))[1]
    )
    with pytest.raises(ModelError, match="differs from transformers' own forward"):
        start(folder)


@pytest.mark.parametrize("defect", ["stays in its regime", "shares keys"])
def test_defects_are_caught(folder: Path, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above fail when a crossing request keeps its keys, or when regimes share a cache."""
    if defect == "shares keys":
        monkeypatch.setattr(SlotAllocation, "namespace", property(lambda self: self.request.namespace))
        names = ["long", "short"]
    else:
        monkeypatch.setattr(Scheduler, "_requeue_past_boundary", lambda self, draft: None)
        names = ["crossing"]
    truth = expected(folder)
    with start(folder) as engine:
        assert [generate(engine, name)[0] for name in names] != [truth[name] for name in names]


# -- dynamic ----------------------------------------------------------------------------------


def test_dynamic_scaling_has_one_base_for_all_lengths(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = build_checkpoint("llama", tmp_path / "dynamic", rope_parameters=rope, max_position_embeddings=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.model.rotary_emb(torch.zeros(1), torch.tensor([[511]]))  # grows to the context length, 4 x 128
    model.model.rotary_emb.rope_type = "default"  # and stays so
    truth = []
    for prompt in prompts().values():
        ids = list(prompt)
        for _ in range(NEW):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        truth.append(ids[len(prompt) :])
    with start(folder) as engine:
        assert engine.served().info.context_length == 512
        assert generate(engine, *prompts()) == truth
        assert [generate(engine, name)[0] for name in prompts()] == truth


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            128,
        ),
        ({"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5}, 128),
        (long_rope() | {"original_max_position_embeddings": 64}, 128),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_every_type_is_right_up_to_its_whole_context(rope: dict[str, Any], length: int, tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, **rope}
    folder = build_checkpoint("llama", tmp_path / "model", rope_parameters=rope, max_position_embeddings=128)
    draw = torch.Generator().manual_seed(11)
    prompt: list[int] = torch.randint(4, 500, (length - 10,), generator=draw).tolist()
    params = GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    with start(folder, chunked_prefill_size=50) as engine:
        assert engine.served().info.context_length == length
        engine.submit("generation", prompt[:20], params).result(60)
        (token,) = engine.submit("generation", prompt, params).result(60).tokens
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    if rope["rope_type"] == "dynamic":
        model.model.rotary_emb(torch.zeros(1), torch.tensor([[length - 1]]))
    with torch.inference_mode():
        assert token == int(model(torch.tensor([prompt]), use_cache=False).logits[0, -1].argmax())


def test_parameters_that_make_no_sense_are_refused(tmp_path: Path, zoo: Callable[[str], Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo("llama"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for rope, reason in (
        ({"rope_type": "spiral", "rope_theta": 10000.0}, "has no rotary scaling of the type 'spiral'"),
        ([4.0], r"rope_parameters \(or rope_scaling\) must be an object, not \[4.0\]"),
        ({"rope_type": "yarn", "rope_theta": 10000.0}, "Missing required keys .*'factor'"),
    ):
        path.write_text(json.dumps({**config, "rope_parameters": rope}))
        with pytest.raises(ModelError, match=reason):
            start(folder)
