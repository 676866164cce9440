"""The check of each sampling parameter; error messages are SGLang's where it has one.

Parameters of unsupported features are accepted with their neutral value and refused with any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import msgspec

from trunkline.core.errors import RequestError
from trunkline.core.types import INT64_MAX, INT64_MIN
from trunkline.plugins.generation.schemas import Grammar
from trunkline.plugins.generation.text.regexes import compile_regexes

MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 1024
MAX_REGEXES = 32
MAX_REGEX_BYTES = 256
MAX_BIASES = 1024
MAX_BIAS = 1e9
MAX_CUSTOM_BYTES = 1 << 16  # of custom_params as msgpack
MAX_GRAMMAR_BYTES = 1 << 17  # of a grammar's text
GRAMMARS: tuple[Literal["json_schema", "regex", "ebnf", "structural_tag"], ...] = (
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
)


def fail(field: str, message: str) -> NoReturn:
    """Raise a RequestError about a field."""
    raise RequestError(message, param=field)


Check = Callable[[str, Any], Any]
"""From the name that the client sent and the value to the checked value; RequestError if it is invalid."""


def _integer(key: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        fail(key, f"{key} must be an integer, got {_abbreviated(value)}.")
    if not INT64_MIN <= value <= INT64_MAX:
        fail(key, f"{key} must fit in 64 bits, got {value}.")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        fail(key, f"{key} must be a number, got {_abbreviated(value)}.")
    try:
        return float(value)
    except OverflowError:
        fail(key, f"{key} must be a finite number, got {_abbreviated(value)}.")


def _abbreviated(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _within(read: Check, allowed: Callable[[Any], bool], rule: str) -> Check:
    """A check that accepts the numbers for which ``allowed`` holds; else the message is "KEY must be RULE, got X."."""

    def check(key: str, value: Any) -> Any:
        number = read(key, value)
        if not allowed(number):
            fail(key, f"{key} must be {rule}, got {value}.")
        return number

    return check


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        fail(key, f"{key} must be true or false, got {_abbreviated(value)}.")
    return value


def _stop(key: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        fail(key, f"{key} must be a string or a list of strings, got {_abbreviated(value)}.")
    if len(stops) > MAX_STOPS:
        fail(key, f"at most {MAX_STOPS} stop strings are allowed, got {len(stops)}")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        fail(key, f"a stop string may have at most {MAX_STOP_LENGTH} characters")
    return tuple(stop for stop in stops if stop)


def _stop_token_ids(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        fail(key, f"{key} must be a list of integers, got {_abbreviated(value)}.")
    if len(value) > MAX_STOP_TOKENS:
        fail(key, f"at most {MAX_STOP_TOKENS} {key} are allowed, got {len(value)}")
    return tuple(_integer(key, item) for item in value if item is not None)


def _seed(key: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        fail(key, f"{key} must be an integer, got {type(value).__name__}.")
    if not INT64_MIN <= value <= INT64_MAX:
        fail(key, f"{key} must be in [-2**63, 2**63 - 1], got {_abbreviated(value)}.")
    return value


def _stop_regex(key: str, value: Any) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        fail(key, f"{key} must be a string or a list of strings, got {_abbreviated(value)}.")
    if len(patterns) > MAX_REGEXES:
        fail(key, f"at most {MAX_REGEXES} {key} patterns are allowed, got {len(patterns)}")
    for pattern in patterns:
        if (size := len(pattern.encode(errors="replace"))) > MAX_REGEX_BYTES:
            fail(key, f"{key} is {size} bytes, over the {MAX_REGEX_BYTES}-byte limit")
    patterns = tuple(pattern for pattern in patterns if pattern)
    if patterns:
        try:
            compile_regexes(patterns)
        except ValueError as error:
            fail(key, f"{key} {error}.")
    return patterns


def _logit_bias(key: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias; :func:`check_bias` checks the ids."""
    if not isinstance(value, dict):
        fail(key, f"{key} must be an object of token ids and numbers, got {_abbreviated(value)}.")
    if len(value) > MAX_BIASES:
        fail(key, f"at most {MAX_BIASES} ids may have a {key}, got {len(value)}")
    biases = {}
    for token, bias in value.items():
        try:
            biases[int(token)] = number = _number(key, bias)
        except (TypeError, ValueError) as error:
            fail(key, str(error))
        if not abs(number) <= MAX_BIAS:
            fail(key, f"{key} must have values in [-1e9, 1e9], got {number}.")
    return tuple(biases.items())


def check_bias(key: str, biases: tuple[tuple[int, float], ...], vocab_size: int) -> None:
    """RequestError for the bias of a token id outside the vocabulary."""
    for token, _ in biases:
        if not 0 <= token < vocab_size:
            fail(key, f"{key} must has keys in [0, {vocab_size - 1}], got {_abbreviated(token)}.")


def _custom_params(key: str, value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        fail(key, f"{key} must be an object, got {_abbreviated(value)}.")
    try:
        size = len(msgspec.msgpack.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        fail(key, f"{key} can't be sent to the engine: {error}")
    if size > MAX_CUSTOM_BYTES:
        fail(key, f"{key} may have at most {MAX_CUSTOM_BYTES} bytes, got {size}")
    return value or None


def _grammar(key: str, value: Any) -> str:
    if not isinstance(value, str):
        fail(key, f"{key} must be a string, got {_abbreviated(value)}.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        fail(key, f"{key} must be Unicode text; it has a lone surrogate.")
    if size > MAX_GRAMMAR_BYTES:
        fail(key, f"{key} may have at most {MAX_GRAMMAR_BYTES} bytes, got {size}.")
    return value


def read_grammar(values: dict[str, Any], names: Mapping[str, str], grammar: Grammar | None = None) -> Grammar | None:
    """Take the checked grammars out of ``values``; "" is none. RequestError if more than one is set.

    ``grammar``: one that the server's own code sets.
    """
    found = [Grammar(key, text) for key in GRAMMARS if (text := values.pop(key, ""))]
    if len(found) + (grammar is not None) > 1:
        key = found[0].kind
        fail(names.get(key, key), "Only one of json_schema, regex, ebnf, or structural_tag can be set.")
    return found[0] if found else grammar


def check_minimum(names: Mapping[str, str], minimum: int, limit: int | None) -> None:
    """RequestError if ``min_new_tokens`` is negative or above ``max_new_tokens`` (``limit``).

    ``names``: what the client calls a parameter, where that isn't its key.
    """
    key, other = (names.get(name, name) for name in ("min_new_tokens", "max_new_tokens"))
    if minimum < 0:
        fail(key, f"{key} must be in [0, {other}], got {minimum}.")
    if limit is not None and minimum > limit:
        fail(key, f"{key} must be in [0, {other}({limit})], got {minimum}.")


def _sample_count(key: str, value: Any) -> int:
    number = _integer(key, value)
    if number < 0:
        fail(key, f"{key} must be at least 1, got {number}.")
    return max(1, number)


def _unsupported(*neutral: Any, check: Check | None = None) -> Check:
    """The check of an unsupported parameter: null and ``neutral`` values are accepted.

    ``check`` comes first, so that invalid values get the same message as in SGLang.
    """

    def refuse(key: str, value: Any) -> None:
        if value is None:
            return
        if check is not None:
            value = check(key, value)
        if not any(type(value) is type(item) and value == item for item in neutral):
            fail(key, f"{key} is not supported yet; leave it out or set it to {_abbreviated(neutral[0])}.")

    return refuse


_penalty = _within(_number, lambda x: -2 <= x <= 2, "in [-2, 2]")

CHECKS: dict[str, Check] = {
    "max_new_tokens": _within(_integer, lambda x: x >= 0, "at least 0"),
    "temperature": _within(_number, lambda x: 0 <= x < math.inf, "a non-negative finite number"),
    "top_p": _within(_number, lambda x: 0 < x <= 1, "in (0, 1]"),
    "top_k": _within(_integer, lambda x: x == -1 or x >= 1, "-1 (disable) or at least 1"),
    "min_p": _within(_number, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "no_stop_trim": _boolean,
    "n": _sample_count,
    "stream_interval": _within(_integer, lambda x: x >= 1, "at least 1"),
    "sampling_seed": _seed,
    "min_new_tokens": _integer,  # and check_minimum
    "frequency_penalty": _penalty,
    "presence_penalty": _penalty,
    "repetition_penalty": _within(_number, lambda x: 0 < x <= 2, "in (0, 2] (1.0 = no penalty)"),
    "stop_regex": _stop_regex,
    "logit_bias": _logit_bias,
    "custom_params": _custom_params,
    **dict.fromkeys(GRAMMARS, _grammar),
}

UNSUPPORTED: dict[str, Check] = {
    "beam_width": _unsupported(1, check=_within(_integer, lambda x: x >= 1, "at least 1")),
    "watermark": _unsupported(None, False, {}),
}

# Checked, but without effect: no text tokenizer of transformers 5 puts spaces between special tokens.
IGNORED: dict[str, Check] = {"spaces_between_special_tokens": _boolean}
