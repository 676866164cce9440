"""SmolLM2-135M-Instruct in float32: the greedy output of transformers, alone, in batches, in chunks and with the cache.

For these prompts the gap between the two most likely tokens is always far larger than rounding errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from trunkline.core import Engine
from trunkline.core.errors import ModelError
from trunkline.core.model.sources import catalogue
from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.plugins.generation.offline import generate

DEMO = "demo:smollm2-135m-instruct"
COUNT = "1, 2, 3, 4, 5, 6, 7,"
COUNTED = [216, 40, 28, 216, 41, 28, 216, 33, 32, 28, 216, 33, 33, 28, 216, 33, 34, 28, 216, 33, 35, 28, 216, 33]
DATE = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33, 34]
DATE += [42, 37, 35, 30, 2]
DAYS = [4590, 359, 260, 2009, 282, 260, 2605, 281, 1686, 42, 1116, 33, 30, 12397, 198, 34, 30, 14801, 198, 35, 30]
DAYS += [15083, 198, 36, 30, 14963, 198, 37, 30, 11655, 198, 38]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    try:
        catalogue.fetch(DEMO)
    except ModelError as error:
        pytest.skip(f"{DEMO} isn't here: {error}")
    with Engine(DEMO, dtype="float32", chunked_prefill_size=16) as engine:
        yield engine


def chat(engine: Engine, text: str) -> list[int]:
    tokenizer: Any = engine.tokenizer("")
    messages = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def test_golden_output_alone_batched_chunked_and_cached(engine: Engine) -> None:
    capital, days = chat(engine, "What is the capital of France?"), chat(engine, "List the days of the week.")
    assert len(capital) == 37
    raw = engine.encode(COUNT), engine.encode("The capital of France is")
    prompts = [*raw, capital, days]
    expected = [COUNTED, DATE, [504, 3575, 282, 4649, 314, 7042, 30, 2], DAYS]
    for _ in range(2):  # the second time from the cache
        for prompt, ids in zip(prompts, expected, strict=True):
            [record] = generate(engine, [prompt], temperature=0, max_new_tokens=len(ids))
            assert record["output_ids"] == ids
        assert engine.call("flush_cache")
        together = generate(engine, prompts, temperature=0, max_new_tokens=32)
        for record, ids in zip(together, expected, strict=True):
            assert record["output_ids"][: len(ids)] == ids
    assert together[1]["text"] == " Paris.\n\nThe answer is: 2018-01-22 12:12:53."
    assert together[2]["text"] == "The capital of France is Paris."


@pytest.mark.field
@pytest.mark.parametrize(
    ("stop", "text", "last"),
    [
        ("<|im_end|>", "The capital of France is Paris.", 2),
        (".<|im_end|>", "The capital of France is Paris", 2),
        ("<|im_start|>", "The capital of France is Paris.\n", 1),
    ],
)
def test_a_stop_string_may_be_a_special_token(engine: Engine, stop: str, text: str, last: int) -> None:
    """The model ends its message, and continues with ignore_eos: <|im_end|> is 2 and <|im_start|> is 1."""
    prompt = chat(engine, "What is the capital of France?")
    [record] = generate(engine, [prompt], temperature=0, max_new_tokens=32, ignore_eos=True, stop=stop)
    assert record["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert (record["text"], record["output_ids"][-1]) == (text, last)
    tokenizer: Any = engine.tokenizer("")
    assert stop in tokenizer.decode(record["output_ids"], skip_special_tokens=False)


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU doesn't multiply bfloat16")
@pytest.mark.usefixtures("engine")
def test_golden_output_in_bfloat16() -> None:
    with Engine(DEMO, dtype="bfloat16") as engine:
        [record] = generate(engine, [COUNT], temperature=0, max_new_tokens=24)
        assert record["output_ids"] == COUNTED
        [answer] = generate(engine, [chat(engine, "What is the capital of France?")], temperature=0, max_new_tokens=24)
        assert answer["text"] == "The capital of France is Paris."
