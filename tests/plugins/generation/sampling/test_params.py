"""Every sampling parameter: what passes, and with which words the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trunkline.core.errors import ConfigError, RequestError
from trunkline.plugins.generation.sampling.checks import CHECKS, IGNORED, LATER
from trunkline.plugins.generation.sampling.params import Sampling, parse_sampling
from trunkline.plugins.generation.service import read_preferred


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
        ({"temperature": -0.5}, "temperature must be a non-negative finite number, got -0.5."),
        ({"temperature": float("inf")}, "temperature must be a non-negative finite number, got inf."),
        ({"temperature": float("nan")}, "temperature must be a non-negative finite number, got nan."),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'."),
        ({"temperature": True}, "temperature must be a number, got True."),
        ({"temperature": 10**400}, "temperature must be a finite number, got 1"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
        ({"top_p": 1.1}, "top_p must be in (0, 1], got 1.1."),
        ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
        ({"top_k": 1.5}, "top_k must be an integer, got 1.5."),
        ({"top_k": 2**70}, "top_k must fit in 64 bits"),
        ({"min_p": 2}, "min_p must be in [0, 1], got 2."),
        ({"stop": ["x"] * 33}, "at most 32 stop strings are allowed, got 33"),
        ({"stop": "x" * 257}, "a stop string may have at most 256 characters"),
        ({"stop": 5}, "stop must be a string or a list of strings, got 5."),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, got 5."),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be an integer, got 'a'."),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false, got 'yes'."),
        ({"n": -1}, "n must be at least 1, got -1."),
        ({"sampling_seed": "x"}, "sampling_seed must be an integer, got 'x'."),
        ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
        ({"min_new_tokens": -1}, "min_new_tokens must be in [0, max_new_tokens], got -1."),
        ({"min_new_tokens": 3}, "min_new_tokens is not supported yet"),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2], got 3."),
        ({"presence_penalty": 1}, "presence_penalty is not supported yet"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0."),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not supported yet"),
        ({"json_schema": "{}"}, "json_schema is not supported yet"),
        ({"regex": "a+"}, "regex is not supported yet"),
        ({"ebnf": "x"}, "ebnf is not supported yet"),
        ({"structural_tag": "x"}, "structural_tag is not supported yet"),
        ({"stop_regex": "x"}, "stop_regex is not supported yet"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported yet"),
        ({"temperatur": 1}, "unknown field `temperatur`, expected one of `max_new_tokens`, "),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_sampling(given)
    assert caught.value.message.startswith(message)
    assert caught.value.status == 400
    assert caught.value.param == next(iter(given))


def test_null_is_the_default_for_every_parameter() -> None:
    nulls = dict.fromkeys((*CHECKS, *LATER, *IGNORED))
    assert parse_sampling(nulls) == Sampling(max_new_tokens=None)
    assert parse_sampling({}) == Sampling()


def test_what_unmodified_clients_send_passes() -> None:
    sampling = parse_sampling(
        {
            "max_new_tokens": 16.0,
            "min_new_tokens": 0,
            "n": 1,
            "stop": [],
            "stop_token_ids": [2, None],
            "temperature": 0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0,
            "repetition_penalty": 1,
            "ignore_eos": False,
            "regex": None,
            "json_schema": "",
            "logit_bias": {},
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
        }
    )
    assert sampling == Sampling(max_new_tokens=16, temperature=0.0, stop_token_ids=(2,))


def test_n_zero_is_one() -> None:
    assert parse_sampling({"n": 0}).n == 1


@pytest.mark.parametrize("given", [{"temperature": 0}, {"temperature": 1e-7}, {"top_k": 1}])
def test_greedy_reaches_the_engine_as_temperature_zero(given: dict[str, Any]) -> None:
    assert parse_sampling(given).for_engine(5, 7).temperature == 0.0


def test_the_request_wins_over_preferred_parameters() -> None:
    preferred = {"temperature": 0, "top_p": 0.5}
    sampling = parse_sampling({"temperature": 1}, preferred)
    assert (sampling.temperature, sampling.top_p) == (1.0, 0.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"nope": 1}'])
def test_bad_preferred_parameters_stop_start_up(text: str) -> None:
    with pytest.raises(ConfigError, match="--preferred-sampling-params"):
        read_preferred(text)


def test_preferred_parameters() -> None:
    assert read_preferred(None) == {}
    assert read_preferred('{"temperature": 0}') == {"temperature": 0}
