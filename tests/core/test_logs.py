"""What a client or a file puts into a log line stays in that line."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from trunkline.core.logs import MAX_MESSAGE, LineFormatter, RateLimited, escape_controls

pytestmark = pytest.mark.field

FORGED = "models/a\n2026-01-01 00:00:00 INFO trunkline.request: rid=forged"


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger that writes as both processes do, and what it wrote."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.Logger("x")
    logger.addHandler(handler)
    yield logger, stream
    handler.close()


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (FORGED, FORGED.replace("\n", r"\u000a")),
        ("a\r\x1b[2Jb\x00", r"a\u000d\u001b[2Jb\u0000"),
        ("a\u2028b\x85\u202ec", r"a\u2028b\u0085\u202ec"),
        ("caf\u00e9 \u4e2d \U0001f600", "caf\u00e9 \u4e2d \U0001f600"),
        ("\udcff", r"\udcff"),
    ],
)
def test_a_name_can_not_begin_another_line(lines: tuple[logging.Logger, io.StringIO], given: str, written: str) -> None:
    logger, stream = lines
    logger.warning("no weights at %s", given)
    assert stream.getvalue() == f"WARNING x: no weights at {written}\n"
    stream.getvalue().encode()  # no lone surrogate is left


def test_a_traceback_is_indented_and_can_not_be_taken_for_a_line(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = lines
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    assert first == "ERROR x: it failed"
    assert "ValueError: models/a" in stream.getvalue()
    assert all(line.startswith("    ") for line in rest)


def test_a_message_has_a_bounded_length(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = lines
    logger.warning("a" * 10_000_000)
    assert len(stream.getvalue()) < MAX_MESSAGE + 100
    assert stream.getvalue().endswith("a…\n")


def test_plain_text_is_left_alone() -> None:
    assert escape_controls("rid=1 model=/a b/c") == "rid=1 model=/a b/c"


def test_similar_lines_are_counted_instead(lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = lines
    limited = RateLimited(logger, logging.WARNING, seconds=1000)
    for number in range(5):
        limited.log("bad request %d", number)
    limited._next = 0.0
    limited.log("bad request %d", 9)
    limited.log("bad request %d", 10)
    assert stream.getvalue().splitlines() == [
        "WARNING x: bad request 0",
        "WARNING x: bad request 9 (4 similar ones were not logged)",
    ]
