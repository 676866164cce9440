"""Reads the inputs of a body: one or several texts, pairs of texts or lists of token ids, and their request ids."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, cast

from msgspec import Struct

from trunkline.core.client.replies import check_rids
from trunkline.core.errors import RequestError
from trunkline.core.types import ServedModel

Text = str | list[str]
"""A text, or a pair of texts."""


class Inputs(Struct, frozen=True):
    """The inputs of a request: texts or lists of token ids. ``single``: the client sent one input, not a list.

    ``field`` is the client's name of the field, for errors.
    """

    texts: list[Text] = []
    ids: list[list[int]] = []
    single: bool = False
    field: str = "input"

    def __len__(self) -> int:
        return len(self.texts) or len(self.ids)


# -- what bodies hold ------------------------------------------------------------------------


def inputs_from_python(given: Sequence[Any]) -> Inputs:
    """The inputs of a Python caller (argument ``texts``): texts and pairs of texts, or lists of token ids.

    RequestError for an entry of another type, and for texts mixed with token ids.
    """
    texts: list[Text] = []
    ids: list[list[int]] = []
    for index, entry in enumerate(given):
        if isinstance(entry, str):
            texts.append(entry)
        elif len(entry) == 2 and all(isinstance(part, str) for part in entry):
            texts.append(list(entry))
        elif len(entry) and all(isinstance(part, Integral) for part in entry):
            ids.append([int(part) for part in entry])
        else:
            raise RequestError(f"texts[{index}] is neither a text, nor a pair of texts, nor a list of token ids.")
    if texts and ids:
        raise RequestError("texts mixes texts and token ids; send only texts or only lists of token ids.")
    return Inputs(texts=texts, ids=ids, field="texts")


def inputs_from_body(text: str | list[str | list[str]] | None, input_ids: list[int | list[int]] | None) -> Inputs:
    """The inputs of a body with ``text`` (one, several, pairs) or ``input_ids``. RequestErrors have SGLang's texts."""
    if text is None and input_ids is None:
        raise RequestError("At least one of text, input_ids, or image should be provided")
    if text is not None and input_ids is not None:
        raise RequestError("text and input_ids cannot be provided at the same time")
    if input_ids is not None:
        ids, single = as_id_lists(input_ids)
        return Inputs(ids=ids, single=single, field="input_ids")
    assert text is not None
    if isinstance(text, str):
        return Inputs(texts=[text], single=True, field="text")
    for index, entry in enumerate(text):
        if not isinstance(entry, str) and len(entry) != 2:
            raise RequestError(f"text[{index}]: a pair has two texts, this one has {len(entry)}.", param="text")
    return Inputs(texts=list(text), field="text")


def as_id_lists(input_ids: list[int | list[int]], field: str = "input_ids") -> tuple[list[list[int]], bool]:
    """Lists of ids, and whether the client sent a single one. RequestError for empty lists and mixed types."""
    if not input_ids:
        raise RequestError(f"{field} cannot be empty.", param=field)
    kinds = set(map(type, input_ids))  # there may be a million
    if kinds == {int}:
        return [cast("list[int]", input_ids)], True
    if int in kinds:
        raise RequestError(f"{field} mixes ids and lists of ids.", param=field)
    several = cast("list[list[int]]", input_ids)
    for index, ids in enumerate(several):
        with locate_errors(field, index):
            if not ids:
                raise RequestError("a list of ids cannot be empty.")
    return several, False


def assign_rids(
    given: str | list[str] | None, count: int, *, single: bool, samples: int = 1, number: bool = True
) -> list[str]:
    """A request id for each sequence: the client's, or new ones. Several samples of an input always get new ones.

    If the client sent one id for several inputs, the input's index is appended; RequestError unless ``number``.
    """
    if isinstance(given, str) and given and not single and not number:
        raise RequestError("For a batch, rid must be a list with one id per input.", param="rid")
    if isinstance(given, list) and len(given) != count:
        raise RequestError("The specified rids length mismatch with the batch_size for batch processing.", param="rid")
    if samples > 1 or not given:
        return [new_rid() for _ in range(count * samples)]
    if isinstance(given, str):
        return [given] if single else [f"{given}_{index}" for index in range(count)]
    check_rids(given)
    return given


def new_rid() -> str:
    """A new request id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def read_salt(cache_salt: str | None, extra_key: str | None = None) -> bytes:
    """A request's salt. Requests with different salts share no cached prefix; either field alone is enough."""
    salt = (extra_key or "").encode()
    return salt + b"\xff" + cache_salt.encode() if cache_salt else salt  # 0xff is in no UTF-8 text


def check_vocabulary(ids: Sequence[int], served: ServedModel, field: str = "input_ids", *, advice: str = "") -> None:
    """RequestError for ids outside the model's vocabulary. Where they are too large, its message ends with ``advice``,
    if given: they may be another tokenizer's."""
    vocabulary = served.info.vocab_size
    if max(ids) >= vocabulary:
        message = f"The {field} contains values greater than the vocab size ({vocabulary}): {max(ids)}."
        raise RequestError(f"{message} {advice}".rstrip(), param=field)
    if min(ids) < 0:
        raise RequestError(f"The {field} contains a negative value: {min(ids)}.", param=field)


def check_batch_size(count: int, limit: int, field: str) -> None:
    """RequestError when ``field`` has more items than one request may have (``--max-batch-size``)."""
    if count > limit:
        raise RequestError(
            f"{field} has {count} items; at most {limit} are allowed. Split it, or raise --max-batch-size.", param=field
        )


@contextmanager
def locate_errors(field: str, index: int, *, single: bool = False) -> Iterator[None]:
    """Add the field to RequestErrors of the block: item ``index`` of a list, or the whole field if ``single``."""
    try:
        yield
    except RequestError as error:
        raise locate_error(error, field, None if single else index) from None


def locate_error(error: RequestError, field: str, index: int | None) -> RequestError:
    """The same error about ``field``, or about item ``index`` of it (``text[3]: …``).

    An error that names another field keeps that name.
    """
    place = field if index is None else f"{field}[{index}]"
    return RequestError(
        error.message if index is None else f"{place}: {error.message}",
        status=error.status,
        param=place if error.param in (None, field) else error.param,
        code=error.code,
        retry_after=error.retry_after,
    )
