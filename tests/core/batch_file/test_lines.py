"""Lines of files of requests: which are run, and why the others aren't."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trunkline.core.batch_file.lines import InvalidLine, read_line

URLS = {"/v1/shout", "/whisper"}
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/shout", "body": {"text": "x", "stream": False}}


def encode(**fields: Any) -> bytes:
    """A line with these fields, except those that are ``...``."""
    return json.dumps({name: value for name, value in (GOOD | fields).items() if value is not ...}).encode()


def test_a_request_keeps_its_body_as_it_is() -> None:
    line = b'{"custom_id": "\\u00e4", "method": "POST", "url": "/v1/shout?a=1", "body": {"n": 1.50, "n": 2}, "x": 1}\n'
    seen: set[str] = set()
    request = read_line(line, 3, URLS, seen)
    assert (request.custom_id, request.url) == ("ä", "/v1/shout?a=1")
    assert request.body == b'{"n": 1.50, "n": 2}'
    assert seen == {"ä"}


@pytest.mark.parametrize(
    ("line", "custom_id", "code", "words"),
    [
        (b"{bad", None, "invalid_json_line", "isn't a JSON object"),
        (b"[1]", None, "invalid_json_line", "isn't a JSON object"),
        (b'{"custom_id": "\xff"}', None, "missing_custom_id", "custom_id is missing"),
        (b"[" * 100_000, None, "invalid_json_line", "isn't a JSON object"),
        (encode(custom_id=...), None, "missing_custom_id", "custom_id is missing"),
        (encode(custom_id=""), None, "missing_custom_id", "custom_id is missing"),
        (encode(custom_id=5), None, "missing_custom_id", "custom_id is missing"),
        (encode(custom_id="old"), "old", "duplicate_custom_id", "custom_id 'old'"),
        (encode(method=...), "a", "invalid_method", "must be POST, got none"),
        (encode(method="GET"), "a", "invalid_method", 'must be POST, got "GET"'),
        (encode(url=...), "a", "invalid_url", "one of /v1/shout, /whisper; got none"),
        (encode(url="/v1/other"), "a", "invalid_url", 'got "/v1/other"'),
        (encode(url="http://elsewhere/v1/shout"), "a", "invalid_url", "one of"),
        (encode(url="/v1/shout?\n"), "a", "invalid_url", "one of"),
        (encode(url="/v1/shout?" + "x" * 5000), "a", "invalid_url", "one of"),
        (encode(body=...), "a", "invalid_body", "must be a JSON object, got none"),
        (encode(body="text"), "a", "invalid_body", 'got "text"'),
        (encode(body={"stream": True}), "a", "invalid_body", "body.stream must be false"),
        (encode(body={"stream": "true"}), "a", "invalid_body", "body.stream must be false"),
    ],
)
def test_other_lines_say_what_is_wrong(line: bytes, custom_id: str | None, code: str, words: str) -> None:
    with pytest.raises(InvalidLine) as raised:
        read_line(line, 7, URLS, {"old"})
    error = raised.value.error
    assert (raised.value.custom_id, error.code, error.line) == (custom_id, code, 7)
    assert words in error.message
    assert len(error.message) < 400


def test_a_line_that_is_refused_still_takes_its_id() -> None:
    seen: set[str] = set()
    with pytest.raises(InvalidLine, match="url"):
        read_line(encode(url="/no"), 1, URLS, seen)
    with pytest.raises(InvalidLine, match="earlier line"):
        read_line(encode(), 2, URLS, seen)
