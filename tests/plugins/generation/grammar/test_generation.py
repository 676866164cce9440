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
from trunkline.plugins.generation.grammar.llguidance_engine import LlguidanceMatcher
from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary
from trunkline.plugins.generation.grammar.masks import MaskFiller
from trunkline.plugins.generation.grammar.state import MAX_EXCESS, GrammarState, MaskTime
from trunkline.plugins.generation.service import Service

from .conftest import problem_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS: list[dict[str, str]] = [
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": "[a-f]{3,20}(-[0-9]{2}){1,4}"},
    {"ebnf": 'root ::= item (";" item){2,4}\nitem ::= [A-Z] [a-z]{0,5}'},
    {"regex": "(yes|no|perhaps), [^x]{5,9}\\."},
    {},
]


def bodies(endings: dict[str, float], count: int = 12, **more: Any) -> list[dict[str, Any]]:
    """Requests with different grammars, prompts and seeds; some have none."""
    return [
        {
            "input_ids": [5 + (index * 7 + place * 3) % 300 for place in range(4 + 11 * (index % 3))],
            "sampling_params": {
                "max_new_tokens": 70,
                "temperature": 1.0,
                "sampling_seed": index,
                "logit_bias": endings,
                **GRAMMARS[index % len(GRAMMARS)],
                **more,
            },
        }
        for index in range(count)
    ]


def outcome(record: dict[str, Any]) -> tuple[list[int], str, Any]:
    return record["output_ids"], record["text"], record["meta_info"]["finish_reason"]


def numbers(value: Any) -> list[float]:
    """The numbers in nested lists, and the lengths of these."""
    if not isinstance(value, list):
        return [] if value is None else [value]
    return [len(value), *(number for each in value for number in numbers(each))]


@pytest.fixture(scope="module")
def folder(zoo: Callable[[str], Path]) -> Path:
    return zoo("llama")


@pytest.fixture
def engine(recorded_engine: Callable[..., Any], folder: Path) -> Any:
    return recorded_engine(folder)


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


def test_what_a_mask_thread_finds_out_later_changes_no_reply(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sequence ends, the finish reason, and the text, of which a stream had parts before."""
    a, b = engine.engine.client.tokenizer(engine.lane.served.name).encode("ab", add_special_tokens=False)
    cases: list[tuple[str, dict[str, Any], list[int], str]] = [
        ("ab", {}, [a, b], "stop"),
        ("ab", {"max_new_tokens": 2}, [a, b], "stop"),
        ("[ab]{9}", {"max_new_tokens": 5, "logit_bias": {str(a): 50}}, [a] * 5, "length"),
        ("a+", {"ignore_eos": True, "logit_bias": {str(EOS): 50, str(a): 20}}, [a, EOS], "stop"),
        ("ab", {"ignore_eos": True, "stop_token_ids": [b]}, [a, b], "stop"),
    ]
    base = {"max_new_tokens": 9, "skip_special_tokens": False, "temperature": 0}
    for hidden in (True, "last"):
        bodies = [
            {"text": "x", "sampling_params": base | more | {"regex": regex}, "return_hidden_states": hidden}
            for regex, more, *_ in cases
        ]
        expected = [engine(**body, return_logprob=True)[0] for body in bodies]
        assert [(each["output_ids"], each["meta_info"]["finish_reason"]["type"]) for each in expected] == [
            (ids, reason) for *_, ids, reason in cases
        ]
        with monkeypatch.context() as patch:
            patch.setattr(MaskTime, "slow", property(lambda self: True, lambda self, value: None), raising=False)
            for body, whole in zip(bodies, expected, strict=True):
                for late in (engine(**body, return_logprob=True)[0], engine.stream(**body, return_logprob=True)[-1]):
                    assert outcome(late) == outcome(whole)
                    for name in ("hidden_states", "output_token_logprobs", "completion_tokens"):
                        found = numbers(late["meta_info"][name])
                        assert found == pytest.approx(numbers(whole["meta_info"][name]), abs=1e-4)


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


def test_a_matcher_that_gives_up_ends_its_request_only(engine: Any, monkeypatch: Any) -> None:
    """Here after its first tokens, because no time is left. The others of the batch don't notice."""
    plain = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 20, "sampling_seed": 1, "ignore_eos": True}}
    expected = outcome(engine(**plain)[0])
    accept = GrammarState.accept

    def exhausted(self: GrammarState, token: int) -> None:
        if self.grammar.text == "a+":
            self.spent.excess += MAX_EXCESS / 8
        accept(self, token)

    monkeypatch.setattr(GrammarState, "accept", exhausted)
    good = {"input_ids": [5, 6], "sampling_params": {"regex": "b{20}", "max_new_tokens": 30}}
    bad = {"input_ids": [5], "sampling_params": {"regex": "a+", "max_new_tokens": 30, "logit_bias": {str(EOS): -50}}}
    failed: list[RequestError] = []
    answer = engine._answer

    async def caught(service: Any, body: Any) -> Any:
        try:
            return await answer(service, body)
        except RequestError as error:
            failed.append(error)

    monkeypatch.setattr(engine, "_answer", caught)
    first, second, third = engine.together([plain, good, bad])
    assert third is None
    (error,) = failed
    assert error.message == "The regex grammar can't be followed any further: it takes too much time for each token"
    assert (error.status, error.param) == (400, "regex")
    assert outcome(first[0]) == expected
    assert second[0]["text"] == "b" * 20


def test_a_mask_that_takes_long_delays_its_own_request_only(
    engine: Any, endings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With extra outputs too: their results are those of the pass that gives the token."""
    slow = bodies(endings, 1)[0] | {"return_logprob": True, "return_hidden_states": True}
    expected = engine(**slow)[0]
    others_ended = threading.Event()
    waited: list[bool] = []
    fill = LlguidanceMatcher.fill

    def blocked(self: LlguidanceMatcher, mask: Any) -> None:
        waited.append(others_ended.wait(60))
        fill(self, mask)

    monkeypatch.setattr(LlguidanceMatcher, "fill", blocked)

    async def run(service: Service) -> Any:
        first = asyncio.ensure_future(engine._answer(service, slow))
        plain = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
        await engine._answer(service, plain)
        assert not first.done()
        others_ended.set()
        return await first

    (record,) = engine.engine.run(run(engine.engine.service(Service)), 120)
    assert all(waited)
    assert outcome(record) == outcome(expected)
    for name in ("output_token_logprobs", "hidden_states"):
        assert len(record["meta_info"][name]) == len(expected["meta_info"][name])
        assert len(record["meta_info"][name]) > 0


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
