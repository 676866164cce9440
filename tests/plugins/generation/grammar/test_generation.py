"""Generation with grammars: what ends it, and that batches, caches and retraction change no result."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.core.testing import EOS
from trunkline.plugins.generation.grammar.grammars import Grammars
from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary
from trunkline.plugins.generation.grammar.masks import MaskFiller
from trunkline.plugins.generation.grammar.state import GrammarState
from trunkline.plugins.generation.service import Service

from .conftest import GRAMMARS, SCHEMA, bodies, outcome, problem_of


def fits(index: int, text: str) -> bool:
    match index % len(GRAMMARS):
        case 0:
            return not problem_of(SCHEMA, text)
        case 1:
            return re.fullmatch("[a-f]{3,20}(-[0-9]{2}){1,4}", text) is not None
        case 2:
            return re.fullmatch("[A-Z][a-z]{0,5}(;[A-Z][a-z]{0,5}){2,4}", text) is not None
        case 3:
            return re.fullmatch("(yes|no|perhaps), [^x]{5,9}\\.", text, re.DOTALL) is not None
    return True


def test_batches_chunks_caches_and_retraction_change_no_result(
    recorded_engine: Callable[..., Any], folder: Path, endings: dict[str, float]
) -> None:
    requests = bodies(endings)
    engine = recorded_engine(folder)
    alone = [outcome(engine(**body)[0]) for body in requests]
    for index, (_, text, finish) in enumerate(alone):
        assert finish["type"] == "length" or fits(index, text), text
    assert sum(finish["type"] == "stop" for _, _, finish in alone) >= 8
    together = [outcome(records[0]) for records in engine.together(requests)]  # cached prefixes, mixed batches
    assert together == alone
    assert max(len(batch.rows) for batch in engine.batches) >= 6
    chunked = recorded_engine(folder, chunked_prefill_size=4, disable_radix_cache=True)
    seen: set[str] = set()

    def must_retract(request: Any) -> bool:
        """Each request once, after some of its tokens."""
        due = request.output_len == 3 + len(request.rid) % 5 and request.rid not in seen
        seen.update([request.rid] * due)
        return due

    chunked.must_retract = must_retract
    again = [outcome(records[0]) for records in chunked.together(requests)]
    assert again == alone
    assert len(chunked.retracted) >= 6


def test_requests_of_a_session_have_grammars_of_their_own(
    recorded_engine: Callable[..., Any], folder: Path, endings: dict[str, float]
) -> None:
    engine = recorded_engine(folder)
    service = engine.engine.service(Service)

    async def open_session() -> None:
        service.sessions.open("s")

    engine.engine.run(open_session())
    history: list[int] = []
    for turn, index in enumerate((1, 4, 3, 2)):  # one has no grammar
        sampling = bodies(endings)[index]["sampling_params"]
        session = {"id": "s"} | ({"rid": f"turn{turn - 1}"} if turn else {})
        body = {"input_ids": [6 + turn] * 4, "sampling_params": sampling, "return_prompt_token_ids": True}
        [record] = engine(**body, rid=f"turn{turn}", session_params=session)
        prompt = record["prompt_token_ids"]
        assert prompt == [*history, *[6 + turn] * 4]
        [alone] = engine(input_ids=prompt, sampling_params=sampling)
        assert outcome(record) == outcome(alone)
        assert outcome(record)[2]["type"] == "length" or fits(index, record["text"])
        history = [*prompt, *record["output_ids"]]


@pytest.mark.parametrize("defect", ["neighbour", "not advanced", "not masked"])
def test_a_seeded_defect_is_detected(
    defect: str, recorded_engine: Callable[..., Any], folder: Path, endings: dict[str, float], monkeypatch: Any
) -> None:
    """The mask of another row; a matcher that misses a token; a mask that isn't applied."""
    requests = bodies(endings, 4)
    # One body, and grammars that are compiled already: all requests are in each other's batches.
    body = {name: [each[name] for each in requests] for name in ("input_ids", "sampling_params")}
    engine = recorded_engine(folder)
    assert all(fits(index, outcome(record)[1]) for index, record in enumerate(engine(**body)))
    start, accept = MaskFiller.start, GrammarState.accept
    if defect == "neighbour":

        def rolled(self: MaskFiller, rows: Any) -> Any:
            masks = start(self, rows)
            return masks and replace(masks, rows=masks.rows[::-1].copy())

        monkeypatch.setattr(MaskFiller, "start", rolled)
    elif defect == "not masked":
        monkeypatch.setattr(Grammars, "apply", lambda *_: None)
        monkeypatch.setattr(GrammarState, "accept", lambda self, token: None)
    else:
        skipped: list[int] = []

        def forgetful(self: GrammarState, token: int) -> None:
            skipped.append(token)
            if len(skipped) != 9:
                accept(self, token)

        monkeypatch.setattr(GrammarState, "accept", forgetful)
    try:
        records = [outcome(record) for record in engine(**body)]
    except RequestError:
        return  # a matcher refuses a token that its mask doesn't have
    assert not all(fits(index, text) for index, (_, text, _) in enumerate(records))


def test_streams_equal_whole_replies(engine: Any, endings: dict[str, float]) -> None:
    for body in bodies(endings, 5):
        whole = engine(**body)[0]
        frames = engine.stream(**body)
        assert frames[-1]["text"] == whole["text"]
        assert frames[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
        assert all(frames[-1]["text"].startswith(frame["text"]) for frame in frames)


def test_the_end_of_the_grammar_is_the_last_token_and_part_of_the_text(engine: Any) -> None:
    record = engine(text="x", sampling_params={"regex": "ab", "max_new_tokens": 9})[0]
    assert record["text"] == "ab"
    assert record["meta_info"]["finish_reason"] == {"type": "stop", "matched": record["output_ids"][-1]}
    last = engine(text="x", sampling_params={"regex": "ab", "max_new_tokens": len(record["output_ids"])})[0]
    assert last["meta_info"]["finish_reason"]["type"] == "stop"  # not "length"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_comes_only_where_the_text_is_complete(engine: Any, ignore_eos: bool) -> None:
    """With ignore_eos too: a grammar says itself where its text may end."""
    params = {"regex": "a{3,}", "logit_bias": {str(EOS): 100}, "max_new_tokens": 20, "ignore_eos": ignore_eos}
    record = engine(text="x", sampling_params=params)[0]
    assert record["text"] in ("aaa", "aaaa")  # a token may have two letters
    assert record["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert record["output_ids"][-1] == EOS


def test_min_new_tokens_forbids_the_end_only_while_something_else_may_follow(engine: Any) -> None:
    params = {"logit_bias": {str(EOS): 100}, "max_new_tokens": 20, "min_new_tokens": 6}
    assert len(engine(text="x", sampling_params=params | {"regex": "a+"})[0]["output_ids"]) >= 7
    assert engine(text="x", sampling_params=params | {"regex": "ab"})[0]["text"] == "ab"


def test_the_length_cuts_and_zero_tokens_are_possible(engine: Any) -> None:
    record = engine(text="x", sampling_params={"regex": "a{50}", "max_new_tokens": 5})[0]
    assert record["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    assert set(record["text"]) == {"a"}
    assert engine(text="x", sampling_params={"regex": "a{50}", "max_new_tokens": 0})[0]["output_ids"] == []


def test_a_request_whose_logits_leave_no_token_is_a_400(engine: Any) -> None:
    (token,) = engine.engine.client.tokenizer(engine.lane.served.name).encode("q", add_special_tokens=False)
    params = {"regex": "aq", "stop_token_ids": [token], "min_new_tokens": 9, "max_new_tokens": 20}
    with pytest.raises(RequestError, match="forbid every token that the grammar allows here") as caught:
        engine(text="x", sampling_params=params)
    assert caught.value.param == "regex"
    assert caught.value.status == 400


def test_stops_inside_a_grammar(engine: Any, endings: dict[str, float]) -> None:
    base = {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 70, "logit_bias": endings}
    cut = engine(text="x", sampling_params=base | {"stop": '"sizes"'})[0]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": '"sizes"'}
    assert '"sizes"' not in cut["text"]
    assert cut["text"].startswith("{")
    matched = engine(text="x", sampling_params=base | {"stop_regex": "name\\W+"})[0]
    assert matched["meta_info"]["finish_reason"] == {"type": "stop", "matched": "name\\W+"}
    (bracket,) = engine.engine.client.tokenizer(engine.lane.served.name).encode("[", add_special_tokens=False)
    token = engine(text="x", sampling_params=base | {"stop_token_ids": [bracket]})[0]
    assert token["meta_info"]["finish_reason"] == {"type": "stop", "matched": bracket}
    assert token["text"].rstrip().endswith(":")  # a stop token isn't part of the text, unlike the end of a grammar


def test_samples_of_one_prompt_each_follow_the_grammar(engine: Any, endings: dict[str, float]) -> None:
    params = {"n": 5, "json_schema": json.dumps(SCHEMA), "max_new_tokens": 90, "logit_bias": endings}
    records = engine(text="some prompt", sampling_params=params | {"sampling_seed": 3})
    assert len({record["text"] for record in records}) > 1
    for record in records:
        assert not problem_of(SCHEMA, record["text"]), record["text"]


def test_log_probabilities_are_those_of_the_allowed_tokens(engine: Any) -> None:
    """Of the masked logits, as in SGLang: where one token is allowed, it has the probability 1."""
    body = {"text": "x", "return_logprob": True, "top_logprobs_num": 5, "sampling_params": {"regex": "[ab]c"}}
    meta = engine(**body)[0]["meta_info"]
    first, second = meta["output_top_logprobs"]
    allowed = [entry for entry in first if entry[0] > -1e30]
    assert len(allowed) == 2
    assert sum(2.718281828 ** entry[0] for entry in allowed) == pytest.approx(1, abs=1e-4)
    assert second[0][0] == pytest.approx(0, abs=1e-6)
    assert meta["output_token_logprobs"][1][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"json_schema": "INVALID"}, "Failed to compile json_schema grammar: it is not valid JSON"),
        ({"json_schema": '{"not": {}}'}, 'Failed to compile json_schema grammar: Unimplemented keys: ["not"]'),
        ({"regex": "("}, "Failed to compile regex grammar: invalid regular expression: unclosed group"),
        ({"ebnf": "root ::= x"}, "Failed to compile ebnf grammar: line 1: rule 'root' refers to 'x'"),
        ({"structural_tag": '{"format": {}}'}, "Failed to compile structural_tag grammar: the form with"),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_an_invalid_grammar_is_a_400_that_names_its_field(
    engine: Any, grammar: dict[str, str], message: str, n: int
) -> None:
    with pytest.raises(RequestError) as caught:
        engine(text="some words", sampling_params=grammar | {"n": n})
    assert caught.value.message.startswith(message)
    assert (caught.value.status, caught.value.param) == (400, next(iter(grammar)))


@pytest.fixture
def other_weights(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_weight_update_in_mid_reply(
    engine: Any, other_weights: Path, mode: str, endings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, so that the reply must be the same; the new stage's matcher gets the output so far."""
    body = bodies(endings, 1)[0]
    expected = outcome(engine(**body)[0])
    engine.flush()
    loaded: list[Vocabulary] = []
    monkeypatch.setattr(Vocabulary, "load", lambda self: loaded.append(self))
    lane, stage = engine.lane, engine.lane.stages["generation"]
    finish, stopped = lane.finish, threading.Event()

    def observed(*args: Any, **options: Any) -> Any:
        steps = finish(*args, **options)
        if not stopped.is_set() and any(step.request.output_len == 5 for step in steps):
            if mode == "retract":
                assert lane.retract() == []
            lane.paused = True
            stopped.set()
        return steps

    lane.finish = observed

    async def run(service: Service) -> Any:
        reply = asyncio.ensure_future(engine._answer(service, body))
        await asyncio.to_thread(stopped.wait, 60)
        answer = await engine.engine.client.call("update_weights", model_path=str(other_weights))
        assert answer["success"]
        await engine.engine.client.call("continue")
        return await reply

    (record,) = engine.engine.run(run(engine.engine.service(Service)), 120)
    assert outcome(record)[:2] == expected[:2]
    assert lane.stages["generation"] is not stage
    assert loaded == []  # the tokenizer stays, and loading it again would stop the engine
