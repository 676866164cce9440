"""``--kv-cache-dtype int8`` from the settings to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trunkline.core import Engine
from trunkline.core.cache.pool import KVPool
from trunkline.core.engine.lane import Lane
from trunkline.core.errors import ConfigError, ModelError
from trunkline.core.model.attention import paged_layout
from trunkline.core.model.verification import attention
from trunkline.core.server.info import InfoReplies
from trunkline.kernels.quantized.cache import dequantize, quantize
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation.offline import generate

PROMPTS = [list(range(4, 9)), list(range(60, 71)), [7 + 31 * n % 480 for n in range(40)]]
NEW_TOKENS = 16
ROUNDED = "rounded-for-tests"  # attention over rounded keys and values


def start(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), dtype="float32", threads=1, **options)


def lane_of(engine: Engine) -> Lane:
    transport: Any = engine.client.transport
    lane: Lane = transport.loop.lanes[0]
    return lane


def answers(engine: Engine) -> list[list[int]]:
    records = generate(engine, PROMPTS, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    return [record["output_ids"] for record in records]


def attend(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any) -> Any:
    key, value = (dequantize(quantize(x), x.shape[-1]) for x in (key, value))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


@pytest.fixture
def rounded(zoo: Callable[[str], Path]) -> Iterator[Callable[[list[int]], torch.Tensor]]:
    """transformers' logits of a sequence, with keys and values rounded as the pool has them."""
    transformers.AttentionInterface.register(ROUNDED, attend)
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        zoo("llama"), dtype=torch.float32, attn_implementation=ROUNDED
    ).eval()

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        found: torch.Tensor = whole(torch.tensor([ids]), use_cache=False).logits[0]
        return found

    yield logits
    del ALL_ATTENTION_FUNCTIONS._global_mapping[ROUNDED]


@torch.inference_mode()
def logits_of(lane: Lane, ids: list[int], cut: int) -> torch.Tensor:
    """Of a sequence that is computed in two passes."""
    model = lane.model
    pool, table = KVPool(model.kv_shapes, len(ids), model.kv_dtype, "cpu"), torch.arange(len(ids)).int().flip(0)[None]
    parts = []
    for first, end in ((0, cut), (cut, len(ids))):
        layout = paged_layout(table.numpy(), [(first, end)])
        parts.append(model.forward(torch.tensor(ids[first:end]), torch.arange(first, end), layout, pool).clone())
    return model.heads["lm"](torch.cat(parts))


def test_parity_with_transformers_over_rounded_keys(
    zoo: Callable[[str], Path], rounded: Callable[[list[int]], torch.Tensor]
) -> None:
    """Within 2e-3: a number that is nearly half-way between two integers may be rounded to either."""
    with start(zoo("llama"), kv_cache_dtype="int8") as engine, start(zoo("llama")) as plain:
        expected = rounded(PROMPTS[2])
        for cut in (1, 17, 39):
            assert (logits_of(lane_of(engine), PROMPTS[2], cut) - expected).abs().max() < 2e-3
        assert (logits_of(lane_of(plain), PROMPTS[2], 17) - expected).abs().max() > 4e-3


def test_tokens_are_those_of_transformers_over_rounded_keys(
    zoo: Callable[[str], Path], rounded: Callable[[list[int]], torch.Tensor]
) -> None:
    """Up to a step whose best two logits are so close that one number, rounded to the other side, may decide."""
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            best = rounded(ids)[-1].topk(2)
            if best.values[0] - best.values[1] < 4e-3:
                break
            ids.append(int(best.indices[0]))
        expected.append(ids[len(prompt) :])
    assert sum(map(len, expected)) > NEW_TOKENS
    with start(zoo("llama"), kv_cache_dtype="int8", chunked_prefill_size=16) as engine:
        for _ in range(2):  # then from the prefix cache
            found = answers(engine)
            assert [own[: len(other)] for own, other in zip(found, expected, strict=True)] == expected


def test_the_pool_has_the_planned_size(zoo: Callable[[str], Path]) -> None:
    with start(zoo("llama"), kv_cache_dtype="int8", max_total_tokens=100) as engine, start(zoo("llama")) as plain:
        lane, other = lane_of(engine), lane_of(plain)
        assert lane.runner.pool is not None
        assert lane.candidate is not None
        assert other.candidate is not None
        tensors = [*lane.runner.pool.keys, *lane.runner.pool.values]
        assert all(tensor.dtype == torch.int8 for tensor in tensors)
        size = lane.candidate.plan.kv_bytes_per_token
        assert sum(tensor.nbytes for tensor in tensors) == 101 * size
        assert size < 0.3 * other.candidate.plan.kv_bytes_per_token
        for started, used in ((engine, "int8"), (plain, "float32")):
            (served,) = started.client.models
            replies = InfoReplies({}, [lane_of(started).settings], lambda _: {}, lambda _: {})
            assert served.kv_cache_dtype == used
            assert replies.server_info(served)["kv_cache_dtype"] == used
            assert replies.long_model_info(served)["kv_cache_dtype"] == used


def test_weight_updates_keep_it(zoo: Callable[[str], Path], other: Callable[[str], Path]) -> None:
    with start(other("llama"), kv_cache_dtype="int8") as fresh:
        expected = answers(fresh)
    with start(zoo("llama"), kv_cache_dtype="int8") as engine:
        assert engine.call("update_weights", model_path=str(other("llama")))["success"]
        assert answers(engine) == expected
        assert engine.client.models[0].kv_cache_dtype == "int8"


def test_encoders_have_no_cache(zoo: Callable[[str], Path]) -> None:
    with start(zoo("bert"), kv_cache_dtype="int8") as engine, start(zoo("bert")) as plain:
        assert engine.client.models[0].kv_cache_dtype is None
        assert (encode(engine, ["a cat"]) == encode(plain, ["a cat"])).all()


def test_what_is_refused(zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype = 'fp8'"):
        start(zoo("llama"), kv_cache_dtype="fp8")
    with pytest.raises(ModelError, match="only the attention backend 'cpu' on a CPU has it, not 'torch_native'"):
        start(zoo("llama"), kv_cache_dtype="int8", attention_backend="torch_native")
    monkeypatch.setattr(attention, "LOW_PRECISION", 1e-5)
    with pytest.raises(ModelError, match="can't be served with --kv-cache-dtype int8: its warm-up differs by"):
        start(zoo("llama"), kv_cache_dtype="int8")
