"""Sequences whose masks take long, or fail: their replies don't depend on when, and others don't notice."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.core.testing import EOS
from trunkline.plugins.generation.grammar.llguidance_engine import LlguidanceMatcher
from trunkline.plugins.generation.grammar.state import MAX_EXCESS, GrammarState, MaskTime
from trunkline.plugins.generation.service import Service

from .conftest import bodies, outcome


def numbers(value: Any) -> list[float]:
    """The numbers in nested lists, and the lengths of these."""
    if not isinstance(value, list):
        return [] if value is None else [value]
    return [len(value), *(number for each in value for number in numbers(each))]


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
