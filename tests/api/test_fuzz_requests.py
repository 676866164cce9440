"""The judge of the random requests (fuzz_requests.py) accepts right answers, and finds each of many wrong ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

VOCABULARY, END = 512, 2


@pytest.fixture(scope="module")
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tests/api/fuzz_requests.py")


@pytest.fixture(scope="module")
def model(fuzz: ModuleType) -> Any:
    return fuzz.Model(vocabulary=VOCABULARY, context=512, hidden=8, end=END)


def record(one: Any, tokens: int) -> dict[str, Any]:
    """A right record with ``tokens`` tokens so far, of one expected record."""
    prompt = one.ids or [5, 6]
    ids = [10 + index % 400 for index in range(tokens)]
    meta: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "cached_tokens": 0}
    asked = one.logprobs
    if asked["return_logprob"]:
        text = "t" if one.body.get("return_text_in_logprobs") else None
        start = len(prompt) if asked["logprob_start_len"] in (None, -1) else asked["logprob_start_len"]
        rows = {"input": prompt[start:], "output": ids or [10]}
        for side, row in rows.items():
            first = [None] if side == "input" else [-0.5]
            values = [*first, *[-0.5] * len(row)]
            meta[f"{side}_token_logprobs"] = [[value, token, text] for value, token in zip(values, row, strict=False)]
            for name, wanted in (
                ("top", asked["top_logprobs_num"] or 0),
                ("token_ids", len(asked["token_ids_logprob"] or ())),
            ):
                if wanted:
                    meta[f"{side}_{name}_logprobs"] = [[[-0.5, 7, text]] * wanted for _ in row]
    found: dict[str, Any] = {"text": "a" * tokens, "output_ids": ids, "meta_info": meta | {"finish_reason": None}}
    if one.ids is not None and one.body.get("return_prompt_token_ids"):
        found["prompt_token_ids"] = one.ids
    return found


def answer(fuzz: ModuleType, case: Any) -> Any:
    """What a right server answers to a correct request."""
    expected = fuzz._expected(case.body)
    records = []
    for one in expected:
        given, left = one.sampling.get("max_new_tokens", 128), 512 - len(one.ids or [5, 6])
        most = left if given is None else min(int(given), left)  # the default may be more than fits
        records.append([record(one, tokens) for tokens in sorted({min(1, most), most})])
        records[-1][-1]["meta_info"]["finish_reason"] = {"type": "length", "length": most}
    _, single = fuzz.shape(case.body)
    alone = single and len(expected) == 1
    if case.body.get("stream"):
        frames = [
            frame if alone else frame | {"index": index} for index, all_of in enumerate(records) for frame in all_of
        ]
        return fuzz.Answer(200, frames, streamed=True, done=True)
    last = [all_of[-1] for all_of in records]
    return fuzz.Answer(200, last[0] if alone else last)


def cases(fuzz: ModuleType, model: Any, count: int = 600, verdict: str = "answered") -> list[Any]:
    generator = fuzz.Generator(1, model)
    every = [generator.next() for _ in range(count)]
    return [case for case in every if case.verdict == verdict]


def test_every_kind_of_request_is_made(fuzz: ModuleType, model: Any) -> None:
    generator = fuzz.Generator(3, model)
    every = [generator.next() for _ in range(3000)]
    correct = [case.body for case in every if case.verdict == "answered"]
    assert {case.verdict for case in every} == {"answered", "refused", "either"}
    assert any(case.leave is not None for case in every)
    assert any(case.may_abort for case in every)
    sampling = [
        one for body in correct for given in [body.get("sampling_params") or {}]
        for one in (given if isinstance(given, list) else [given])
    ]  # fmt: skip
    used = Counter(name for one in sampling for name in one)
    assert used.keys() >= fuzz.parameters(model).keys() | {"max_new_tokens", "min_new_tokens", "n"}
    fields = Counter(name for body in correct for name in body)
    assert fields.keys() >= {"text", "input_ids", "input_embeds", "rid", "stream", "return_logprob", "cache_salt"}
    refused = {case.what.partition(" = ")[0] for case in every if case.verdict == "refused"}
    assert len(refused) > 35


def test_the_same_seed_makes_the_same_requests(fuzz: ModuleType, model: Any) -> None:
    first, second = ([case.content for case in _all(fuzz, model, 7)] for _ in range(2))
    assert first == second
    assert first != [case.content for case in _all(fuzz, model, 8)]


def _all(fuzz: ModuleType, model: Any, seed: int) -> list[Any]:
    generator = fuzz.Generator(seed, model)
    return [generator.next() for _ in range(200)]


def test_right_answers_pass(fuzz: ModuleType, model: Any) -> None:
    for case in cases(fuzz, model):
        fuzz.check(case, answer(fuzz, case), model)


def test_refusals_pass(fuzz: ModuleType, model: Any) -> None:
    for case in cases(fuzz, model, verdict="refused"):
        fuzz.check(case, fuzz.Answer(400, {"error": {"message": "no"}}), model)
        fuzz.check(case, fuzz.Answer(200, [{"error": {"message": "no", "code": 400}}], streamed=True, done=True), model)


def _records(right: Any) -> list[dict[str, Any]]:
    """The last record of each sequence."""
    if not right.streamed:
        return [right.value] if isinstance(right.value, dict) else list(right.value)
    return [frame for frame in right.value if frame["meta_info"]["finish_reason"] is not None]


def _meta(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    return lambda right: change(_records(right)[-1]["meta_info"])


def _withdraw(right: Any) -> None:
    """Text of an earlier frame is no beginning of what follows."""
    assert right.streamed
    first = next(frame for frame in right.value if frame["meta_info"]["finish_reason"] is None)
    first["text"] += "b"


def _set(right: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(right, name, value)


BUGS: dict[str, Callable[[Any], Any]] = {
    "500": lambda right: _set(right, status=500),
    "503 in a frame": lambda right: right.value.append({"error": {"message": "down", "code": 503}}),
    "a refusal": lambda right: _set(right, status=400, value={"error": {"message": "no"}}, streamed=False),
    "no end of the stream": lambda right: _set(right, done=not right.streamed),
    "text withdrawn": _withdraw,
    "one record less": lambda right: right.value.remove(_records(right)[-1]),
    "a list for one": lambda right: _set(right, value=[right.value]),
    "one record for a list": lambda right: _set(right, value=right.value[0]),
    "miscounted tokens": _meta(lambda meta: meta.update(completion_tokens=meta["completion_tokens"] + 1)),
    "miscounted prompt": _meta(lambda meta: meta.update(prompt_tokens=meta["prompt_tokens"] + 1)),
    "more cached than there is": _meta(lambda meta: meta.update(cached_tokens=meta["prompt_tokens"])),
    "token beyond the vocabulary": lambda right: _records(right)[-1]["output_ids"].__setitem__(0, VOCABULARY),
    "too many tokens": lambda right: (
        _records(right)[-1]["output_ids"].append(9),
        _meta(lambda meta: meta.update(completion_tokens=meta["completion_tokens"] + 1))(right),
    ),
    "an end nobody asked for": _meta(lambda meta: meta.update(finish_reason={"type": "stop", "matched": "nobody"})),
    "an abort": _meta(lambda meta: meta.update(finish_reason={"type": "abort", "message": "", "status_code": None})),
    "a failure inside": _meta(lambda meta: meta.update(finish_reason={"type": "abort", "status_code": 500})),
    "a logprob less": _meta(lambda meta: meta["output_token_logprobs"].pop()),
    "an input logprob less": _meta(lambda meta: meta["input_token_logprobs"].pop()),
    "a positive logprob": _meta(lambda meta: meta["output_token_logprobs"].__setitem__(0, [0.5, 10, None])),
    "another token's logprob": _meta(lambda meta: meta["output_token_logprobs"].__setitem__(0, [-0.5, 99, None])),
    "a top logprob less": _meta(lambda meta: meta["output_top_logprobs"][0].pop()),
    "no logprobs of the ids": _meta(lambda meta: meta.pop("output_token_ids_logprobs")),
    "other prompt ids": lambda right: _records(right)[-1].update(prompt_token_ids=[1]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_answer_is_found(fuzz: ModuleType, model: Any, bug: str) -> None:
    """In nearly all answers: an abort hides a wrong length, and of texts and embeddings no ids are known."""
    found = tried = 0
    for case in cases(fuzz, model):
        case.may_abort = False
        right = answer(fuzz, case)
        try:
            BUGS[bug](right)
        except (KeyError, IndexError, TypeError, AttributeError, AssertionError, StopIteration, ValueError):
            continue  # this answer has no place for it
        if json.dumps(right.value) == json.dumps(answer(fuzz, case).value) and right.status == 200 and right.done:
            continue
        tried += 1
        try:
            fuzz.check(case, right, model)
        except (AssertionError, KeyError, TypeError):
            found += 1
    assert tried >= 5
    assert found / tried > 0.5, f"{found} of {tried}"


def test_wrong_requests_must_be_refused(fuzz: ModuleType, model: Any) -> None:
    for case in cases(fuzz, model, verdict="refused"):
        with pytest.raises(AssertionError):
            fuzz.check(case, fuzz.Answer(200, {}), model)
