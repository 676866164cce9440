"""Sampling parameters as clients send them, checked one by one.

The messages are SGLang's where it has one. ``null`` means the default. Keys of features that
aren't built yet pass with their neutral value and are refused with any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

from msgspec import Meta, Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import INT64_MAX, INT64_MIN, Count, Int64, TokenId

from .schemas import GenerationParams

GREEDY_BELOW = 1e-6  # temperatures under this are greedy
MAX_STOPS = 32
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKENS = 1024
DEFAULT_NEW_TOKENS = 128
NO_LIMIT = -1  # chat clients' word for as many tokens as fit; on /generate it is null


class Sampling(Struct, frozen=True, kw_only=True):
    """Checked sampling parameters. ``max_new_tokens`` None = as many as the context allows."""

    max_new_tokens: Count | None = DEFAULT_NEW_TOKENS
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] = -1
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: Annotated[int, Meta(ge=1, le=INT64_MAX)] = 1
    stream_interval: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = None
    sampling_seed: Int64 | None = None

    def for_engine(self, limit: int, seed: int) -> GenerationParams:
        """The engine's part, for one sequence of at most ``limit`` new tokens."""
        greedy = self.temperature < GREEDY_BELOW or self.top_k == 1
        return GenerationParams(
            max_new_tokens=limit,
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


def parse_sampling(
    given: Mapping[str, Any],
    preferred: Mapping[str, Any] | None = None,
    spelled: Mapping[str, str] | None = None,
) -> Sampling:
    """Check ``given`` laid over the server's ``preferred`` parameters. RequestError names the field.

    ``spelled``: what the client calls a parameter, where that isn't its key.
    """
    merged = {**(preferred or {}), **given}
    names = spelled or {}
    values: dict[str, Any] = {}
    for key, value in merged.items():
        if key in CHECKS:
            if value is not None:
                values[key] = CHECKS[key](names.get(key, key), value)
            elif key == "max_new_tokens":
                values[key] = None
        elif key in LATER:
            LATER[key](names.get(key, key), value)
        elif key not in IGNORED:
            known = ", ".join(f"`{name}`" for name in (*CHECKS, *LATER, *IGNORED))
            fail(key, f"unknown field `{key[:64]}`, expected one of {known}")
    return Sampling(**values)


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
