"""One check for each sampling parameter, in SGLang's words where it has some.

Keys of features that aren't built yet pass with their neutral value and are refused with any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

from trunkline.core.errors import RequestError
from trunkline.core.types import INT64_MAX, INT64_MIN

MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 1024


def fail(field: str, message: str) -> NoReturn:
    raise RequestError(message, param=field)


Check = Callable[[str, Any], Any]


def _integer(key: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        fail(key, f"{key} must be an integer, got {_shown(value)}.")
    if not INT64_MIN <= value <= INT64_MAX:
        fail(key, f"{key} must fit in 64 bits, got {value}.")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        fail(key, f"{key} must be a number, got {_shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        fail(key, f"{key} must be a finite number, got {_shown(value)}.")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _within(read: Callable[[str, Any], Any], allowed: Callable[[Any], bool], rule: str) -> Check:
    """A number for which ``allowed`` holds, else "KEY must be RULE, got X."."""

    def check(key: str, value: Any) -> Any:
        number = read(key, value)
        if not allowed(number):
            fail(key, f"{key} must be {rule}, got {value}.")
        return number

    return check


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        fail(key, f"{key} must be true or false, got {_shown(value)}.")
    return value


def _stop(key: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        fail(key, f"{key} must be a string or a list of strings, got {_shown(value)}.")
    if len(stops) > MAX_STOPS:
        fail(key, f"at most {MAX_STOPS} stop strings are allowed, got {len(stops)}")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        fail(key, f"a stop string may have at most {MAX_STOP_LENGTH} characters")
    return tuple(stop for stop in stops if stop)


def _stop_token_ids(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        fail(key, f"{key} must be a list of integers, got {_shown(value)}.")
    if len(value) > MAX_STOP_TOKENS:
        fail(key, f"at most {MAX_STOP_TOKENS} {key} are allowed, got {len(value)}")
    return tuple(_integer(key, item) for item in value if item is not None)


def _samples(key: str, value: Any) -> int:
    number = _integer(key, value)
    if number < 0:
        fail(key, f"{key} must be at least 1, got {number}.")
    return max(1, number)


def _later(*neutral: Any, check: Check | None = None) -> Check:
    """A parameter that isn't built yet: None and ``neutral`` values pass, bad ones keep their message."""

    def refuse(key: str, value: Any) -> None:
        if value is None:
            return
        if check is not None:
            value = check(key, value)
        if not any(type(value) is type(item) and value == item for item in neutral):
            fail(key, f"{key} is not supported yet; leave it out or set it to {_shown(neutral[0])}.")

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
    "ignore_eos": _flag,
    "skip_special_tokens": _flag,
    "no_stop_trim": _flag,
    "n": _samples,
    "stream_interval": _within(_integer, lambda x: x >= 1, "at least 1"),
    "sampling_seed": _integer,
}

LATER: dict[str, Check] = {
    "min_new_tokens": _later(0, check=_within(_integer, lambda x: x >= 0, "in [0, max_new_tokens]")),
    "frequency_penalty": _later(0.0, check=_penalty),
    "presence_penalty": _later(0.0, check=_penalty),
    "repetition_penalty": _later(1.0, check=_within(_number, lambda x: 0 < x <= 2, "in (0, 2] (1.0 = no penalty)")),
    "stop_regex": _later(None, "", []),
    "json_schema": _later(None, ""),
    "regex": _later(None, ""),
    "ebnf": _later(None, ""),
    "structural_tag": _later(None, ""),
    "logit_bias": _later(None, {}),
    "beam_width": _later(1, check=_within(_integer, lambda x: x >= 1, "at least 1")),
    "watermark": _later(None, False, {}),
}

# No effect here: fast tokenizers never put spaces between special tokens, and custom_params feed
# a custom logit processor, which is refused as such.
IGNORED = ("spaces_between_special_tokens", "custom_params")
