"""What bodies ask to run."""

from __future__ import annotations

from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.core.server.api.inputs import (
    Inputs,
    as_id_lists,
    assign_rids,
    check_batch_size,
    inputs_from_body,
    inputs_from_python,
    locate_error,
    locate_errors,
    read_salt,
)


def test_one_and_many() -> None:
    assert inputs_from_body("a", None) == Inputs(texts=["a"], single=True, field="text")
    assert inputs_from_body(["a"], None) == Inputs(texts=["a"], field="text")
    assert inputs_from_body([["a", "b"], "c"], None) == Inputs(texts=[["a", "b"], "c"], field="text")
    assert inputs_from_body(None, [1, 2]) == Inputs(ids=[[1, 2]], single=True, field="input_ids")
    assert inputs_from_body(None, [[1], [2]]) == Inputs(ids=[[1], [2]], field="input_ids")
    assert [len(inputs_from_body(text, None)) for text in ("a", ["a", "b"], [])] == [1, 2, 0]


@pytest.mark.parametrize(
    ("text", "ids", "message"),
    [
        (None, None, "At least one of text, input_ids, or image should be provided"),
        ("a", [1], "text and input_ids cannot be provided at the same time"),
        (["a", ["b"]], None, "text[1]: a pair has two texts, this one has 1."),
        (None, [], "input_ids cannot be empty."),
        (None, [1, [2]], "input_ids mixes ids and lists of ids."),
        (None, [[1], 2], "input_ids mixes ids and lists of ids."),
        (None, [[1], []], "input_ids[1]: a list of ids cannot be empty."),
    ],
)
def test_what_is_refused(text: Any, ids: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        inputs_from_body(text, ids)
    assert caught.value.message == message


def test_ids_of_requests() -> None:
    assert assign_rids("x", 1, single=True) == ["x"]
    assert assign_rids("x", 2, single=False) == ["x_0", "x_1"]
    assert assign_rids(["a", "b"], 2, single=False) == ["a", "b"]
    assert len(set(assign_rids(None, 3, single=False))) == 3
    assert not {"a", "b"} & set(assign_rids(["a", "b"], 2, single=False, samples=2))


@pytest.mark.parametrize(("rid", "message"), [("x", "must be a list"), (["a"], "mismatch"), (["a", "a"], "Duplicate")])
def test_ids_that_do_not_fit_the_batch(rid: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        assign_rids(rid, 2, single=False, number=False)
    assert caught.value.param == "rid"


def test_a_batch_has_a_limit_that_is_named() -> None:
    check_batch_size(3, 3, "texts")
    with pytest.raises(RequestError, match=r"^texts has 4 items; at most 3 .* --max-batch-size") as caught:
        check_batch_size(4, 3, "texts")
    assert caught.value.param == "texts"


def test_errors_name_their_item_and_keep_the_rest() -> None:
    error = RequestError("No.", status=503, param="text", code="c", retry_after=2.0)
    again = locate_error(error, "text", 3)
    assert (again.message, again.status, again.param, again.code, again.retry_after) == (
        "text[3]: No.", 503, "text[3]", "c", 2.0
    )  # fmt: skip
    assert locate_error(error, "inputs", 3).param == "text"
    with pytest.raises(RequestError, match=r"^text\[1\]: No\.$"), locate_errors("text", 1):
        raise error
    with pytest.raises(RequestError, match=r"^No\.$") as caught, locate_errors("inputs", 0, single=True):
        raise RequestError("No.")
    assert caught.value.param == "inputs"


def test_salts_of_different_makers_never_meet() -> None:
    given: list[tuple[str | None, str | None]] = [
        (None, None), ("a", None), (None, "a"), ("a", "a"), (None, "aa"), ("aa", None),
    ]  # fmt: skip
    assert len({read_salt(*pair) for pair in given}) == len(given)


def test_a_single_list_is_told_from_many() -> None:
    assert as_id_lists([1, 2]) == ([[1, 2]], True)
    assert as_id_lists([[1, 2]]) == ([[1, 2]], False)


def test_inputs_of_python_callers() -> None:
    assert inputs_from_python(["a", ["b", "c"]]).texts == ["a", ["b", "c"]]
    assert inputs_from_python([[1, 2], (3,)]).ids == [[1, 2], [3]]
    assert len(inputs_from_python([])) == 0
    for wrong, message in (([[]], r"texts\[0\] is neither"), (["a", ["b", 3]], r"texts\[1\]"), (["a", [5, 6]], "mix")):
        with pytest.raises(RequestError, match=message):
            inputs_from_python(wrong)
