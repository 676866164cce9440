"""Ends of sequences: stop expressions, and their order among strings, tokens and the length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trunkline.core.errors import RequestError


@pytest.fixture
def driver(make_driver: Callable[..., Any], byte_level: Any) -> Any:
    return make_driver(byte_level)


@pytest.fixture
def ids(byte_level: Any) -> list[int]:
    """One token for each character, and one for the special token."""
    pieces = [*"hello world", "<|im_start|>", *" fox"]
    return [byte_level.encode(piece, add_special_tokens=False)[0] for piece in pieces]


def test_the_pattern_of_an_expression_is_the_finish_reason(driver: Any, ids: list[int], byte_level: Any) -> None:
    request = driver.admit(stop_regex=("zz", r"w[a-z]r"))
    assert driver.feed(request, ids).finish == {"type": "stop", "matched": r"w[a-z]r"}
    text = byte_level.decode(request.output)
    assert text == "hello wor"


@pytest.mark.parametrize(
    ("params", "matched"),
    [
        ({"stop": ("llo",), "stop_regex": ("l+o",)}, "llo"),
        ({"stop": ("world",), "stop_regex": ("l+o",)}, "l+o"),
        ({"stop_regex": ("o$", "l")}, "l"),
        ({"stop_regex": ("x*",)}, "x*"),
        ({"stop_regex": (r"<\|im_start\|>",)}, r"<\|im_start\|>"),
        ({"stop_regex": (r"\bfox",), "max_new_tokens": 99}, r"\bfox"),
        ({"stop_regex": ("^world",)}, None),
    ],
)
def test_order_of_finish_reasons(driver: Any, ids: list[int], params: dict[str, Any], matched: str | None) -> None:
    """Strings come before expressions, which are searched in their order, and both before the length."""
    request = driver.admit(**{"max_new_tokens": len(ids), **params})
    length = {"type": "length", "length": len(ids)}
    assert driver.feed(request, ids).finish == ({"type": "stop", "matched": matched} if matched else length)


def test_an_expression_is_reported_before_a_stop_token(driver: Any, ids: list[int]) -> None:
    stop = ids.index(max(ids))
    request = driver.admit(stop_regex=(r"<\|im_start",), stop_token_ids=(ids[stop],))
    assert driver.feed(request, ids).finish == {"type": "stop", "matched": r"<\|im_start"}


def test_the_engine_checks_expressions_too(driver: Any) -> None:
    with pytest.raises(RequestError, match=r"stop_regex '\(' can't be used: missing \): \(\.") as caught:
        driver.admit(stop_regex=("(",))
    assert (caught.value.status, caught.value.param) == (400, "stop_regex")


@pytest.mark.parametrize("field", ["stop", "stop_regex"])
def test_text_needs_a_tokenizer(make_driver: Callable[..., Any], field: str) -> None:
    with pytest.raises(RequestError, match=f"{field} needs a tokenizer, and this model has none") as caught:
        make_driver().admit(**{field: ("x",)})
    assert caught.value.param == field


def test_a_request_that_is_admitted_again_has_its_text(driver: Any, ids: list[int]) -> None:
    request = driver.admit(stop=("llo w",), stop_regex=("z",))
    driver.feed(request, ids[:4])
    request.needs = driver.stage.admit(request)
    assert driver.feed(request, ids[4:]).finish == {"type": "stop", "matched": "llo w"}
