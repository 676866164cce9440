"""All sampling parameters: valid values, and the error messages for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer, BertJapaneseTokenizer

from trunkline.core.errors import ConfigError, RequestError
from trunkline.core.testing.tokenizers import write_tokenizer
from trunkline.plugins.generation.sampling.checks import CHECKS, IGNORED, UNSUPPORTED
from trunkline.plugins.generation.sampling.params import SamplingParams, parse_sampling_params
from trunkline.plugins.generation.schemas import GenerationParams, Grammar
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
        ({"sampling_seed": "x"}, "sampling_seed must be an integer, got str."),
        ({"sampling_seed": 0.5}, "sampling_seed must be an integer, got float."),
        ({"sampling_seed": 2**63}, "sampling_seed must be in [-2**63, 2**63 - 1], got 9223372036854775808."),
        ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
        ({"min_new_tokens": -1}, "min_new_tokens must be in [0, max_new_tokens], got -1."),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "min_new_tokens must be in [0, max_new_tokens(3)], got 4."),
        ({"min_new_tokens": 129}, "min_new_tokens must be in [0, max_new_tokens(128)], got 129."),
        ({"min_new_tokens": "x"}, "min_new_tokens must be an integer, got 'x'."),
        *(
            ({f"{kind}_penalty": value}, f"{kind}_penalty must be in [-2, 2], got {value}.")
            for kind in ("frequency", "presence")
            for value in (2.5, -3, float("nan"))
        ),
        ({"frequency_penalty": "x"}, "frequency_penalty must be a number, got 'x'."),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 0."),
        ({"repetition_penalty": 2.1}, "repetition_penalty must be in (0, 2] (1.0 = no penalty), got 2.1."),
        ({"stop_regex": ["x"] * 33}, "at most 32 stop_regex patterns are allowed, got 33"),
        ({"stop_regex": "é" * 129}, "stop_regex is 258 bytes, over the 256-byte limit"),
        ({"stop_regex": 5}, "stop_regex must be a string or a list of strings, got 5."),
        ({"stop_regex": ["a", None]}, "stop_regex must be a string or a list of strings, got ['a', None]."),
        ({"stop_regex": "a("}, "stop_regex 'a(' can't be used: missing ): a(."),
        ({"stop_regex": ["a", r"(a)\1"]}, r"stop_regex '(a)\\1' can't be used: invalid escape sequence: \1."),
        ({"stop_regex": "(a{1000}){1000}"}, "stop_regex '(a{1000}){1000}' can't be used: invalid repetition size"),
        ({"stop_regex": "\ud800"}, "stop_regex '\\ud800' can't be used: it is not valid Unicode."),
        ({"stop_regex": [r"\pL{5}"] * 2}, r"stop_regex '\\pL{5}' can't be used: with it the patterns need 1"),
        ({"logit_bias": [1]}, "logit_bias must be an object of token ids and numbers, got [1]."),
        ({"logit_bias": {"x": 1}}, "invalid literal for int() with base 10: 'x'"),
        ({"logit_bias": {"100": 1}}, "logit_bias must has keys in [0, 99], got 100."),
        ({"logit_bias": {"-1": 1}}, "logit_bias must has keys in [0, 99], got -1."),
        ({"logit_bias": {"1": "x"}}, "logit_bias must be a number, got 'x'."),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias must have values in [-1e9, 1e9], got nan."),
        ({"logit_bias": {"1": -1.5e9}}, "logit_bias must have values in [-1e9, 1e9], got -1500000000.0."),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "at most 1024 ids may have a logit_bias, got 1025"),
        ({"spaces_between_special_tokens": "no"}, "spaces_between_special_tokens must be true or false, got 'no'."),
        ({"skip_special_tokens": 1}, "skip_special_tokens must be true or false, got 1."),
        ({"no_stop_trim": 1}, "no_stop_trim must be true or false, got 1."),
        ({"custom_params": [1]}, "custom_params must be an object, got [1]."),
        ({"custom_params": {"x": "y" * 65536}}, "custom_params may have at most 65536 bytes, got 65"),
        ({"custom_params": {"x": 2**64}}, "custom_params can't be sent to the engine: "),
        ({"beam_width": 0}, "beam_width must be at least 1, got 0."),
        ({"beam_width": 2}, "beam_width is not supported yet"),
        ({"watermark": {"key": 1}}, "watermark is not supported yet"),
        ({"json_schema": {}}, "json_schema must be a string, got {}."),
        ({"regex": "x" * 131073}, "regex may have at most 131072 bytes, got 131073."),
        ({"ebnf": "\ud800"}, "ebnf must be Unicode text; it has a lone surrogate."),
        ({"lark": "start: /x/"}, "unknown field `lark`, expected one of `max_new_tokens`, "),
        ({"regex": "x", "ebnf": "x"}, "Only one of json_schema, regex, ebnf, or structural_tag can be set."),
        ({"json_schema": "{}", "regex": "x"}, "Only one of json_schema, regex, ebnf, or structural_tag can be set."),
        ({"temperatur": 1}, "unknown field `temperatur`, expected one of `max_new_tokens`, "),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_sampling_params(given, vocab_size=100)
    assert caught.value.message.startswith(message)
    assert caught.value.status == 400
    assert caught.value.param == next(iter(given))


def test_null_is_the_default_for_every_parameter() -> None:
    nulls = dict.fromkeys((*CHECKS, *UNSUPPORTED, *IGNORED))
    assert parse_sampling_params(nulls) == SamplingParams(max_new_tokens=None)
    assert parse_sampling_params({}) == SamplingParams()


@pytest.mark.parametrize("kind", ["json_schema", "regex", "ebnf", "structural_tag"])
def test_grammar(kind: str) -> None:
    """A request's own grammar replaces a preferred one, of the same or another kind."""
    grammar = Grammar(kind, "x")  # type: ignore[arg-type]
    assert parse_sampling_params({kind: "x", "max_new_tokens": 1}).for_engine(1, 0).grammar == grammar
    assert parse_sampling_params({}, {kind: "x"}).grammar == grammar
    assert parse_sampling_params({kind: ""}, {kind: "x"}).grammar is None
    assert parse_sampling_params({"regex": "y"}, {kind: "x"}).grammar == Grammar("regex", "y")


def test_a_grammar_of_the_servers_own() -> None:
    lark = Grammar("lark", "start: /x/")
    assert parse_sampling_params({"regex": None, "ebnf": ""}, {"regex": "x"}, grammar=lark).grammar == lark
    with pytest.raises(RequestError, match="Only one of") as caught:
        parse_sampling_params({"regex": "x"}, names={"regex": "guided_regex"}, grammar=lark)
    assert caught.value.param == "guided_regex"


def test_what_unmodified_clients_send_passes() -> None:
    sampling = parse_sampling_params(
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
            "ebnf": "",
            "stop_regex": [""],
            "logit_bias": {},
            "custom_params": {},
            "beam_width": 1,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
        }
    )
    assert sampling == SamplingParams(max_new_tokens=16, temperature=0.0, stop_token_ids=(2,))


def test_parameters_for_the_engine() -> None:
    """``"1"`` and ``"01"`` are the same id; its last bias is used, as in SGLang."""
    given = {
        "min_new_tokens": 3.0,
        "frequency_penalty": 2,
        "presence_penalty": -2,
        "repetition_penalty": 1e-30,
        "logit_bias": {"1": 5, "99": -1e9, "01": 7},
        "stop_regex": "a|b",
        "custom_params": {"x": [1]},
        "temperature": 1e300,
    }
    params = parse_sampling_params(given, vocab_size=100).for_engine(5, 0)
    assert params == GenerationParams(
        max_new_tokens=5,
        temperature=1e30,
        min_new_tokens=3,
        frequency_penalty=2.0,
        presence_penalty=-2.0,
        repetition_penalty=1e-30,
        logit_bias=((1, 7.0), (99, -1e9)),
        stop_regex=("a|b",),
        custom_params={"x": [1]},
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=GenerationParams) == params


def test_a_preferred_minimum_is_compared_with_the_request_s_limit() -> None:
    with pytest.raises(RequestError, match=r"min_new_tokens must be in \[0, max_new_tokens\(4\)\], got 8\."):
        parse_sampling_params({"max_new_tokens": 4}, {"min_new_tokens": 8})
    assert parse_sampling_params({"max_new_tokens": None}, {"min_new_tokens": 800}).min_new_tokens == 800


def test_tokenizers_of_transformers_ignore_spaces_between_special_tokens(tmp_path: Path) -> None:
    """Therefore the flag has no effect, also for slow tokenizers."""
    write_tokenizer(tmp_path, "decoder")
    fast = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\nab\n")
    slow = BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    )
    for tokenizer, ids in ((fast, [0, 1, 60, 2]), (slow, [1, 3, 5, 1])):
        texts = {tokenizer.decode(ids, spaces_between_special_tokens=flag) for flag in (False, True)}
        assert len(texts) == 1, tokenizer


def test_n_zero_is_one() -> None:
    assert parse_sampling_params({"n": 0}).n == 1


@pytest.mark.parametrize("given", [{"temperature": 0}, {"temperature": 1e-7}, {"top_k": 1}])
def test_greedy_reaches_the_engine_as_temperature_zero(given: dict[str, Any]) -> None:
    assert parse_sampling_params(given).for_engine(5, 7).temperature == 0.0


def test_the_request_wins_over_preferred_parameters() -> None:
    preferred = {"temperature": 0, "top_p": 0.5}
    sampling = parse_sampling_params({"temperature": 1}, preferred)
    assert (sampling.temperature, sampling.top_p) == (1.0, 0.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"nope": 1}'])
def test_bad_preferred_parameters_stop_start_up(text: str) -> None:
    with pytest.raises(ConfigError, match="--preferred-sampling-params"):
        read_preferred(text)


def test_preferred_parameters() -> None:
    assert read_preferred(None) == {}
    assert read_preferred('{"temperature": 0}') == {"temperature": 0}
