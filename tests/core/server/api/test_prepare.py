"""From texts to token ids of the right length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from trunkline.core.client.slices import SLICE, slices
from trunkline.core.client.truncate import Truncation
from trunkline.core.errors import RequestError
from trunkline.core.server.api.inputs import Inputs
from trunkline.core.server.api.prepare import InputPreparer, PreparedInput, encode_pair, prepare_inputs
from trunkline.core.types import ModelInfo, ServedModel

CLS, SEP = 2, 3


@pytest.fixture(scope="session")
def wordpiece(zoo: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(zoo("bert"))


@pytest.fixture
def served() -> ServedModel:
    info = ModelInfo(
        path="/nowhere", architecture="BertModel", model_type="bert", context_length=16, vocab_size=512,
        hidden_size=8, causal=False,
    )  # fmt: skip
    return ServedModel(
        name="tiny", model_path="tiny", tokenizer_path="tiny", info=info, tasks={}, max_total_tokens=64,
        max_running_requests=4, dtype="float32", attention_backend="cpu",
    )  # fmt: skip


def shape(tokenizer: Any, served: ServedModel, *texts: Any, truncate: Truncation = None) -> list[PreparedInput]:
    return InputPreparer(tokenizer, served, truncate=truncate).items(Inputs(texts=list(texts)))


def test_texts_get_the_models_special_tokens(wordpiece: Any, served: ServedModel) -> None:
    [item] = shape(wordpiece, served, "hello there")
    assert item.ids == wordpiece("hello there")["input_ids"]
    assert (item.second_at, item.whole) == (None, 0)


def test_long_texts_are_cut_at_the_named_end(wordpiece: Any, served: ServedModel) -> None:
    text = "the sea of the other " * 8
    whole = wordpiece(text)["input_ids"]
    [end] = shape(wordpiece, served, text, truncate="end")
    [start] = shape(wordpiece, served, text, truncate="start")
    assert end.ids == wordpiece(text, truncation=True, max_length=16)["input_ids"]
    assert start.ids == [whole[0], *whole[-15:]]
    assert end.whole == start.whole == len(whole) > 16


def test_without_truncation_the_item_and_the_limit_are_named(wordpiece: Any, served: ServedModel) -> None:
    text = "the sea of " * 6
    length = len(wordpiece(text)["input_ids"])
    message = rf"^input\[1\]: The input \({length} tokens\) is longer than the model's context length \(16 tokens\)\.$"
    with pytest.raises(RequestError, match=message):
        shape(wordpiece, served, "short", text)
    with pytest.raises(RequestError, match=r"^input\[1\]: The input \(198000 characters\) is longer than the model's"):
        shape(wordpiece, served, "short", text * 3000)


def test_the_beginning_of_a_very_long_text_is_the_same_as_of_all(wordpiece: Any, served: ServedModel) -> None:
    text = "the sea of the other " * 5000
    assert len(text) > SLICE
    whole = wordpiece(text)["input_ids"]
    assert shape(wordpiece, served, text, truncate="end")[0].ids == [*whole[:15], whole[-1]]
    assert shape(wordpiece, served, text, truncate="start")[0].ids == [whole[0], *whole[-15:]]


def test_the_first_tokens_of_a_text_can_be_kept(wordpiece: Any, served: ServedModel) -> None:
    text = "hello: " + "the sea of " * 10
    whole = wordpiece(text)["input_ids"]
    [item] = InputPreparer(wordpiece, served, truncate="start", prompt_tokens=4).items(Inputs(texts=[text]))
    assert item.ids == whole[:4] + whole[-12:]


def test_the_first_tokens_of_a_very_long_text_are_kept_too(wordpiece: Any, served: ServedModel) -> None:
    prompt = "hello: "
    text = prompt + "the sea of the other " * 5000
    assert len(text) > SLICE
    whole = wordpiece(text)["input_ids"]
    keep = len(wordpiece(prompt)["input_ids"]) - 1
    preparer = InputPreparer(
        wordpiece,
        served,
        truncate="start",
        prompt_tokens=keep,
        prompt_characters=len(prompt),
        preprocess=lambda rest: prompt + rest,
    )
    [item] = preparer.items(Inputs(texts=[text[len(prompt) :]]))
    assert item.ids == whole[:keep] + whole[-(16 - keep) :]


def test_what_was_cut_is_counted_or_not_told(wordpiece: Any, served: ServedModel) -> None:
    """A number that is told is true."""
    short, long = "the sea of " * 10, "the sea of the other " * 5000
    [whole, cut, far] = shape(wordpiece, served, "hello", short, long, truncate="end")
    assert whole.report == {}
    assert cut.report == {"truncated": True, "original_tokens": len(wordpiece(short)["input_ids"])}
    assert far.report == {"truncated": True}
    [pair] = shape(wordpiece, served, ["hello", long], truncate="end")
    assert pair.report == {"truncated": True}


@pytest.mark.parametrize("typed", [True, False])
def test_pairs_are_joined_as_the_tokenizer_does(wordpiece: Any, served: ServedModel, typed: bool) -> None:
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * typed
    tokenizer = AutoTokenizer.from_pretrained(wordpiece.name_or_path, model_input_names=names)
    joined = tokenizer("hello", "the sea", return_token_type_ids=True)
    [item] = shape(tokenizer, served, ["hello", "the sea"])
    assert item.ids == joined["input_ids"]
    assert item.second_at == (joined["token_type_ids"].index(1) if typed else None)
    ids, begin, end, _ = encode_pair(tokenizer, "hello", "the sea")
    assert ids[begin:end] == tokenizer.encode("the sea", add_special_tokens=False)


def test_of_a_pair_only_the_second_text_is_cut(wordpiece: Any, served: ServedModel) -> None:
    second = "the sea of " * 10
    expected = wordpiece("hello", second, truncation="only_second", max_length=16)
    [item] = shape(wordpiece, served, ["hello", second], truncate="end")
    assert item.ids == expected["input_ids"]
    assert item.whole == len(wordpiece("hello", second)["input_ids"])
    [item] = shape(wordpiece, served, ["hello", second], truncate="start")
    assert len(item.ids) == 16
    assert item.ids[-1] == expected["input_ids"][-1]
    with pytest.raises(RequestError, match=r"^input\[0\]: The first text of the pair leaves no room"):
        shape(wordpiece, served, ["the sea of " * 10, "hello"], truncate="end")
    with pytest.raises(RequestError, match=r"^input\[0\]: The input \(\d+ tokens\) is longer"):
        shape(wordpiece, served, ["hello", second])


@pytest.mark.parametrize("text", ["", ["", "a"], ["a", ""], ["a", "\u200b"]])
def test_empty_texts_are_refused(wordpiece: Any, served: ServedModel, text: Any) -> None:
    with pytest.raises(RequestError, match=r"^input\[1\]: texts cannot be empty"):
        shape(wordpiece, served, "a", text)


def test_ids_are_checked_and_cut(wordpiece: Any, served: ServedModel) -> None:
    preparer = InputPreparer(wordpiece, served, truncate=True)
    first, last = wordpiece.cls_token_id, wordpiece.sep_token_id
    items = preparer.items(Inputs(ids=[[5, 6], [first, *range(10, 40), last], list(range(10, 40))]))
    assert [item.ids for item in items] == [[5, 6], [first, *range(10, 24), last], list(range(10, 26))]
    assert [item.whole for item in items] == [0, 32, 30]
    for bad in (512, -1):
        with pytest.raises(RequestError, match=r"^ids\[1\]: The ids contains"):
            preparer.items(Inputs(ids=[[1], [bad]], field="ids"))


def test_a_model_without_tokenizer_takes_ids(served: ServedModel) -> None:
    assert InputPreparer(None, served).items(Inputs(ids=[[1, 2]]))[0].ids == [1, 2]
    with pytest.raises(RequestError, match="tiny has no tokenizer"):
        InputPreparer(None, served).items(Inputs(texts=["a"], single=True))


def test_a_pool_that_is_smaller_than_the_context_is_the_limit(wordpiece: Any, served: ServedModel) -> None:
    import msgspec

    small = msgspec.structs.replace(served, max_total_tokens=8)
    assert len(shape(wordpiece, small, "the sea of " * 10, truncate=True)[0].ids) == 8


def test_long_batches_are_divided(wordpiece: Any, served: ServedModel) -> None:
    texts: list[Any] = ["a" * (SLICE // 2), "b" * (SLICE // 2), ["c", "d"], "e" * (3 * SLICE), "f"]
    preparer = InputPreparer(wordpiece, served)
    assert [one[:2] for one in slices(preparer.lengths(Inputs(texts=texts)))] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(slices(preparer.lengths(Inputs(ids=[[1], [2, 3]])))) == [(0, 2, 3)]
    assert list(slices(preparer.lengths(Inputs(texts=[])))) == []


async def test_every_slice_is_off_the_loop_and_order_is_kept(wordpiece: Any, served: ServedModel) -> None:
    class Engine:
        calls = 0

        def tokenizer(self, model: str) -> Any:
            return wordpiece

        async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
            self.calls += 1
            return function(*args)

    engine: Any = Engine()
    texts: list[str | list[str]] = [f"{word} " * (SLICE // 4) for word in ("the", "sea", "other")]
    items = await prepare_inputs(engine, served, Inputs(texts=texts), truncate=True)
    assert engine.calls == 3
    firsts = [item.ids[1] for item in items]
    assert firsts == [wordpiece.encode(word, add_special_tokens=False)[0] for word in ("the", "sea", "other")]


@pytest.mark.field
@pytest.mark.parametrize("text", [" " * 100_000 + "the sea", "a" * 100_000 + " sea", "the " + "\n" * 100_000 + "sea"])
@pytest.mark.parametrize("truncate", ["none", "start", "end"])
def test_long_runs_of_few_tokens_are_tokenised_as_ever(
    wordpiece: Any, served: ServedModel, text: str, truncate: Truncation
) -> None:
    [item] = shape(wordpiece, served, text, truncate=truncate)
    assert item.ids == wordpiece(text)["input_ids"]
    assert not item.cut


@pytest.mark.field
async def test_a_prompt_before_many_texts_is_bounded(wordpiece: Any, served: ServedModel) -> None:
    """Not one of them is tokenised, and the prompt isn't copied for each."""

    class Engine:
        def tokenizer(self, model: str) -> Any:
            return wordpiece

    engine: Any = Engine()
    texts: list[str | list[str]] = ["a"] * 1000
    with pytest.raises(RequestError, match="100001000 characters, counting what is put before each"):
        await prepare_inputs(
            engine, served, Inputs(texts=texts), prompt_characters=100_000, preprocess=lambda text: "p" * 100_000 + text
        )
