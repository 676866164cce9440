"""Adjusted logits: penalties, forbidden end tokens and biases in SGLang's order; other rows aren't changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.sampling import adjust
from trunkline.plugins.generation.sampling.adjust import TokenCounts
from trunkline.plugins.generation.schemas import GenerationParams

VOCABULARY, EOS = 322, 321


def oracle(logits: np.ndarray[Any, Any], output: list[int], params: GenerationParams) -> np.ndarray[Any, Any]:
    """The logits of a request as SGLang 0.5.23 adjusts them.

    Additive penalties come first, then scaling ones (``SamplingBatchInfo.update_penalties``), then logit_bias.
    """
    additive = np.zeros(VOCABULARY, np.float32)
    scaling = np.ones(VOCABULARY, np.float32)
    present = np.zeros(VOCABULARY, np.float32)
    for token in output:
        additive[token] -= np.float32(params.frequency_penalty)
        present[token] = params.presence_penalty
        scaling[token] = params.repetition_penalty
    additive -= present
    if len(output) < params.min_new_tokens:
        additive[[EOS, *params.stop_token_ids]] = -np.inf
    result = logits.astype(np.float32) + additive
    result = np.where(result < 0, result * scaling, result / scaling)
    for token, bias in params.logit_bias:
        result[token] += np.float32(bias)
    return result


PENALTY = st.sampled_from([0.0, -2.0, -0.5, 0.3, 2.0])
PARAMS = st.builds(
    GenerationParams,
    max_new_tokens=st.just(50),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 9),
    frequency_penalty=PENALTY,
    presence_penalty=PENALTY,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    min_new_tokens=st.sampled_from([0, 0, 3, 50]),
    stop_token_ids=st.sampled_from([(), (4, 5, 6)]),
    ignore_eos=st.booleans(),
    logit_bias=st.sampled_from([(), ((4, 5.0), (5, -100.0), (7, 3.0), (EOS, 8.0))]),
)


def follow(driver: Any, params: list[GenerationParams], rounds: int, seed: int) -> list[list[torch.Tensor]]:
    """Run requests together on random logits, and compare with the oracle; returns the adjusted logits of each."""
    draw = torch.Generator().manual_seed(seed)
    requests = [
        driver.admit(key=key, prompt=(5, 7, 9), **{name: getattr(one, name) for name in one.__struct_fields__})
        for key, one in enumerate(params)
    ]
    seen: list[list[torch.Tensor]] = [[] for _ in params]
    for _ in range(rounds):
        # A few tokens are far more likely than the others, so that they are repeated.
        logits = torch.randn(len(requests), VOCABULARY, generator=draw)
        logits[:, 3:9] += 5
        expected = [
            oracle(row.numpy(), request.output, request.params) for row, request in zip(logits, requests, strict=True)
        ]
        driver.steps(*zip(requests, logits, strict=True))
        for index, row in enumerate(driver.seen):
            np.testing.assert_allclose(row.numpy(), expected[index], rtol=2e-6, atol=2e-6)
            seen[index].append(row)
    return seen


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_equals_sglang_s_order(make_driver: Callable[..., Any], params: list[GenerationParams], seed: int) -> None:
    follow(make_driver(), params, 6, seed)


ALL = GenerationParams(
    temperature=0.0,
    frequency_penalty=0.5,
    presence_penalty=0.7,
    repetition_penalty=1.5,
    min_new_tokens=4,
    logit_bias=((4, 4.0),),
)


@pytest.mark.parametrize("bug", ["the prompt counts", "a token is forgotten", "one token too few"])
def test_a_wrong_count_is_detected(make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Seeded bugs, with which the comparison fails."""
    init, add, biases = TokenCounts.__init__, TokenCounts.add, adjust.Adjustment.biases
    if bug == "the prompt counts":
        monkeypatch.setattr(TokenCounts, "__init__", lambda self, tokens: init(self, (5, 7, 9)))
    elif bug == "a token is forgotten":
        monkeypatch.setattr(TokenCounts, "add", lambda self, token: None if token == 4 else add(self, token))
    else:
        monkeypatch.setattr(adjust.Adjustment, "biases", lambda self, output_len: biases(self, output_len + 1))
    with pytest.raises(AssertionError):
        follow(make_driver(), [ALL], 6, 1)


def test_other_rows_are_not_changed(make_driver: Callable[..., Any]) -> None:
    plain = GenerationParams(temperature=0.9, seed=3)
    alone = follow(make_driver(), [plain, plain, plain], 5, 7)
    beside = follow(make_driver(), [plain, ALL, plain], 5, 7)
    for index in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone[index], beside[index], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone[1], beside[1], strict=True))


def test_rows_without_adjustment_need_no_kernel_call(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    driver.stage._adjust = None  # a call would fail
    follow(driver, [GenerationParams(), GenerationParams(stop_token_ids=(3,))], 2, 0)


@pytest.mark.parametrize(
    ("params", "lockstep"),
    [
        ({}, False),
        ({"logit_bias": ((1, 2.0),)}, False),
        ({"min_new_tokens": 1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_lockstep_if_logits_depend_on_the_token_before(
    make_driver: Callable[..., Any], params: dict[str, Any], lockstep: bool
) -> None:
    assert make_driver().admit(**params).needs.lockstep is lockstep


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_tokens_are_forbidden_before_the_minimum(make_driver: Callable[..., Any], ignore_eos: bool) -> None:
    """Also with ignore_eos, as in SGLang; ids outside the vocabulary have no effect."""
    driver = make_driver()
    request = driver.admit(
        min_new_tokens=2, stop_token_ids=(9, 10**6, -4), ignore_eos=ignore_eos, logit_bias=((EOS, 5.0),)
    )
    for _ in range(3):
        driver.steps((request, torch.zeros(VOCABULARY)))
        forbidden = (driver.seen[0] == -torch.inf).nonzero().flatten().tolist()
        assert forbidden == ([9, EOS] if request.output_len <= 2 else [])


def test_a_minimum_leaves_something_to_generate(make_driver: Callable[..., Any]) -> None:
    """If all ids are end tokens, none is forbidden."""
    driver = make_driver()
    request = driver.admit(min_new_tokens=2, stop_token_ids=tuple(range(VOCABULARY)))
    assert driver.feed(request, [5]).finish == {"type": "stop", "matched": 5}


def test_a_stop_string_may_end_a_sequence_before_its_minimum(make_driver: Callable[..., Any], byte_level: Any) -> None:
    driver = make_driver(byte_level)
    ids = byte_level.encode("hello", add_special_tokens=False)
    assert driver.feed(driver.admit(min_new_tokens=40, stop=("he",)), ids).finish == {"type": "stop", "matched": "he"}


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_bias_outside_the_vocabulary_is_refused(make_driver: Callable[..., Any], token: int) -> None:
    with pytest.raises(RequestError, match=rf"logit_bias must has keys in \[0, 321\], got {token}\."):
        make_driver().admit(logit_bias=((token, 1.0),))


def test_counting_continues_when_a_request_is_admitted_again(make_driver: Callable[..., Any]) -> None:
    """When weights change while a request waits, it is admitted again with its output."""
    driver = make_driver()
    request = driver.admit(frequency_penalty=1.0, min_new_tokens=4)
    driver.feed(request, [5, 6, 5])
    request.needs = driver.stage.admit(request)
    driver.steps((request, torch.zeros(VOCABULARY)))
    assert (driver.seen[0, 5], driver.seen[0, 6], driver.seen[0, EOS]) == (-2.0, -1.0, -torch.inf)
    driver.steps((request, torch.zeros(VOCABULARY)))
    assert driver.seen[0, EOS] == 0


def test_token_counts() -> None:
    counts = TokenCounts([])
    for token in [*range(100), *range(50)]:
        counts.add(token)
    ids, times = counts.table()
    assert ids.tolist() == list(range(100))
    assert times.tolist() == [2.0] * 50 + [1.0] * 50


def test_rows_stay_finite_with_extreme_penalties(make_driver: Callable[..., Any]) -> None:
    driver = make_driver()
    request = driver.admit(repetition_penalty=5e-324, frequency_penalty=-2.0, logit_bias=((5, 1e9),))
    for _ in range(5):
        (step,) = driver.steps((request, torch.full((VOCABULARY,), 3e38)))
        assert len(step.tokens) == 1
