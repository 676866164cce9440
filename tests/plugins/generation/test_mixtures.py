"""Replies and streams in any mixture of requests, chunks, cache hits and retractions equal the reply to each alone.

All features of ``/generate`` are switched on at random.
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trunkline.core.types import Needs, PartRow
from trunkline.plugins.generation.sampling import extra_rows
from trunkline.plugins.generation.text import visible

NEAR = 1e-4
HIDDEN = 128  # components of an embedding
BASE = [5 + (index * 37) % 480 for index in range(60)]


@st.composite
def sampling(draw: st.DrawFn) -> dict[str, Any]:
    """Sampling parameters, each at its default or not."""
    limit = draw(st.integers(0, 9))
    params: dict[str, Any] = {
        "max_new_tokens": limit,
        "temperature": draw(st.sampled_from([0, 0.8])),
        "sampling_seed": draw(st.integers(0, 9)),
        "n": draw(st.sampled_from([1, 1, 1, 2])),
        "ignore_eos": draw(st.booleans()),
    }
    others: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.sampled_from([5, 40]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.05),
        "min_new_tokens": st.integers(0, limit),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(st.integers(4, 500).map(str), st.floats(-5, 5), max_size=4),
        "stop": st.sampled_from(["e", ["he", "<", "rese"], "\ufffd", "> s"]),
        "stop_regex": st.sampled_from(["[0-9]{2}", ["t.e", "[aeiou] "], ">$"]),
        "stop_token_ids": st.lists(st.integers(0, 511), max_size=40),
        "skip_special_tokens": st.just(False),
        "no_stop_trim": st.just(True),
        "stream_interval": st.integers(1, 4),
    }
    for name in draw(st.sets(st.sampled_from(sorted(others)), max_size=6)):
        params[name] = draw(others[name])
    return params


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A body of ``/generate``: a common prefix, some tokens of its own, any parameters and any extra outputs."""
    prompt = BASE[: draw(st.integers(0, 40))] + draw(st.lists(st.integers(4, 500), min_size=1, max_size=12))
    body: dict[str, Any] = {"sampling_params": draw(sampling()), "stream": draw(st.booleans())}
    if draw(st.integers(0, 9)):
        body["input_ids"] = prompt
    else:  # embeddings
        body["input_embeds"] = [[(7 * token % 11 - 5) / 50] * HIDDEN for token in prompt]
    if draw(st.integers(0, 3)):
        body["return_logprob"] = True
        body["logprob_start_len"] = draw(st.integers(-1, len(prompt))) if "input_ids" in body else -1
        body["top_logprobs_num"] = draw(st.integers(0, 4))
        body["token_ids_logprob"] = draw(st.lists(st.integers(0, 511), max_size=3))
        body["return_text_in_logprobs"] = draw(st.booleans())
    if draw(st.booleans()):
        body["return_hidden_states"] = draw(st.sampled_from([True, "last"]))
    return body


@pytest.fixture(params=["synchronous", "overlapping", "quantised"])
def pair(
    request: pytest.FixtureRequest,
    zoo: Callable[[str], Path],
    recorded_engine: Callable[..., Any],
) -> tuple[Any, Any]:
    """An engine for single requests, and one with small chunks and a small pool for mixtures.

    In a third of the tests the latter prepares a batch while the one before it is in flight, and in another both have
    quantised weights.
    """
    options: dict[str, Any] = {"quantization": "int8"} if request.param == "quantised" else {}
    busy = recorded_engine(zoo("llama"), chunked_prefill_size=7, max_total_tokens=150, **options)
    if request.param == "overlapping":
        late = importlib.import_module("tests.core.engine.device.late")
        late.move(busy.lane, late.LateDevice())
    busy.lane.scheduler.reserve.ratio = 0.0
    return recorded_engine(zoo("llama"), **options), busy


def last_of(answers: list[dict[str, Any]], body: dict[str, Any]) -> list[dict[str, Any]]:
    """The last record of each sequence. The frames of a stream before it have a beginning of what it has."""
    if not body["stream"]:
        return answers
    done = {answer.get("index", 0): answer for answer in answers}  # later frames of a sequence win
    for frame in answers:
        last = done[frame.get("index", 0)]
        assert last["text"].startswith(frame["text"])
        assert "\ufffd" not in frame["text"] or "\ufffd" in last["text"]
        assert_prefix(frame["output_ids"], last["output_ids"])
        for name, value in frame["meta_info"].items():
            if name.endswith("logprobs"):
                assert_prefix(value, last["meta_info"][name])
    return [done[index] for index in sorted(done)]


def assert_prefix(beginning: list[Any], whole: list[Any]) -> None:
    assert beginning == whole[: len(beginning)]


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    mine, other = found["meta_info"], alone["meta_info"]
    assert (found["output_ids"], found["text"]) == (alone["output_ids"], alone["text"])
    assert mine["finish_reason"] == other["finish_reason"]
    assert mine.keys() == other.keys()
    for name in mine:
        if name.endswith("logprobs"):
            assert_close(mine[name], other[name], name)
    if isinstance(mine.get("hidden_states", [None])[0], list):
        (matrix, *vectors), (whole, *others) = mine["hidden_states"], other["hidden_states"]
        assert len(matrix) == mine["prompt_tokens"] - mine["cached_tokens"]
        assert_close([matrix, vectors], [whole[len(whole) - len(matrix) :] if matrix else [], others], "hidden_states")
    elif "hidden_states" in mine:
        assert_close(mine["hidden_states"], other["hidden_states"], "hidden_states")


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Lists have the same shape, floats are close, and all other values are equal."""
    if isinstance(found, list):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, where)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, abs=NEAR, rel=NEAR), where
    else:
        assert found == expected, where


def check(pair: tuple[Any, Any], mixture: list[dict[str, Any]], seed: int) -> None:
    quiet, busy = pair
    random_source = random.Random(seed)
    busy.must_retract = lambda request: random_source.random() < 0.15
    answers = busy.together(mixture)
    for body, found in zip(mixture, answers, strict=True):
        quiet.flush()
        (alone,) = quiet.together([body | {"stream": False}])
        for one, other in zip(last_of(found, body), alone, strict=True):
            # Samples of one prompt have different cached prefixes, so their hidden states are of different positions.
            assert_same(one, other) if body["sampling_params"]["n"] == 1 else assert_same_samples(one, other)


def assert_same_samples(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for record in (found, alone):
        record["meta_info"].pop("hidden_states", None)
    assert_same(found, alone)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixture=st.lists(bodies(), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_mixture_equals_each_request_alone(pair: tuple[Any, Any], mixture: list[dict[str, Any]], seed: int) -> None:
    check(pair, mixture, seed)


def fixed() -> list[dict[str, Any]]:
    """A mixture with long prompts and different values of logprob_start_len."""
    sampling = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0, "n": 1}
    return [
        {
            "input_ids": BASE[:length],
            "sampling_params": sampling,
            "stream": False,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": 2,
            "token_ids_logprob": [3],
            "return_hidden_states": True,
        }
        for length, start in ((40, 0), (35, 11), (50, 3))
    ]


def test_a_fixed_mixture(pair: tuple[Any, Any]) -> None:
    check(pair, fixed(), seed=1)
    assert pair[1].retracted


def test_a_stream_that_shows_the_beginning_of_a_stop_string_is_detected(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"input_ids": BASE, "sampling_params": {"sampling_seed": 1, "max_new_tokens": 60, "n": 1}, "stream": True}
    texts = ["", *(frame["text"] for frame in pair[0].together([body])[0])]
    pieces = [text.removeprefix(before) for before, text in itertools.pairwise(texts)]
    stop = next(one[-1] + two[0] for one, two in itertools.pairwise(pieces) if one and two)
    body["sampling_params"]["stop"] = stop  # it begins in one token and ends in the next
    check(pair, [body], seed=1)
    monkeypatch.setattr(visible, "partial_stop_length", lambda text, stops: 0)
    with pytest.raises(AssertionError):  # noqa: PT012
        for _ in range(50):  # two tokens that come together have one frame, which is right
            check(pair, [body], seed=1)


@pytest.mark.parametrize("bug", ["sent twice", "chunk boundary", "rows of a neighbour", "needs forgotten"])
def test_seeded_bugs_are_detected(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    mark_sent = extra_rows.ExtraState.mark_sent

    def skip_one(self: extra_rows.ExtraState, row: PartRow) -> None:
        mark_sent(self, row)
        self.logprobs_due += 1

    if bug == "sent twice":
        monkeypatch.setattr(extra_rows.ExtraState, "mark_sent", lambda self, row: None)
    elif bug == "chunk boundary":
        monkeypatch.setattr(extra_rows.ExtraState, "mark_sent", skip_one)
    elif bug == "rows of a neighbour":
        monkeypatch.setattr(
            extra_rows, "_hidden_indices", lambda row, first, end: range(first - row.first, end - row.first)
        )
    else:  # after a retraction, rows that were never sent may be taken from the cache
        stage = pair[1].lane.stages["generation"].stage
        monkeypatch.setattr(stage, "reset", lambda request: Needs(new_tokens=request.needs.new_tokens))
    with pytest.raises(AssertionError):
        test_a_fixed_mixture(pair)
