"""Reads the lines of a file of requests, in the format of OpenAI's batches."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
from msgspec import Raw, Struct

from .schemas import LineError

METHOD = "POST"
MAX_URL = 4096  # characters
UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What decoding JSON may raise."""
_Fields = dict[str, Raw]


class BatchRequest(Struct, frozen=True):
    """A request of the file. ``body``: JSON."""

    custom_id: str
    url: str
    body: bytes


class InvalidLine(Exception):
    """A line that isn't a request. ``custom_id`` is None if it has none."""

    def __init__(self, custom_id: str | None, code: str, message: str, line: int) -> None:
        super().__init__(message)
        self.custom_id = custom_id
        self.error = LineError(code, message, line)


def read_line(text: bytes, number: int, urls: Collection[str], seen: set[str]) -> BatchRequest:
    """The request of a line. InvalidLine if it can't be run.

    ``urls``: the paths that take requests. ``seen``: the ids of earlier lines; the line's own is added.
    """
    try:
        fields = msgspec.json.decode(text, type=_Fields)
    except UNREADABLE as error:
        raise InvalidLine(None, "invalid_json_line", f"The line isn't a JSON object: {error}", number) from None
    custom_id = _string(fields, "custom_id")
    if not custom_id:
        message = "custom_id is missing: it must be a text that differs for every request; the answer has it, too."
        raise InvalidLine(None, "missing_custom_id", message, number)
    if custom_id in seen:
        message = f"An earlier line has the custom_id {custom_id!r}; each must be used once."
        raise InvalidLine(custom_id, "duplicate_custom_id", message, number)
    seen.add(custom_id)
    code, message = _problem(fields, urls)
    if code:
        raise InvalidLine(custom_id, code, message, number)
    return BatchRequest(custom_id, _string(fields, "url") or "", bytes(fields["body"]))


def _problem(fields: _Fields, urls: Collection[str]) -> tuple[str, str]:
    """The error's code and message for method, url or body; two empty texts if there is none."""
    method, url = _string(fields, "method"), _string(fields, "url")
    if method != METHOD:
        return "invalid_method", f"method must be {METHOD}, got {_shown(fields, 'method')}."
    if url is None or url.partition("?")[0] not in urls or len(url) > MAX_URL or not url.isprintable():
        return "invalid_url", f"url must be one of {', '.join(sorted(urls))}; got {_shown(fields, 'url')}."
    try:
        body = msgspec.json.decode(fields.get("body", b"null"), type=_Fields)
        stream = msgspec.json.decode(body.get("stream", b"null"))
    except UNREADABLE:
        return "invalid_body", f"body must be a JSON object, got {_shown(fields, 'body')}."
    if stream not in (None, False):
        return "invalid_body", "body.stream must be false or left out: a line of answers is a whole reply."
    return "", ""


def _string(fields: _Fields, name: str) -> str | None:
    """The field if it is a text, else None."""
    try:
        return msgspec.json.decode(fields[name], type=str)
    except (KeyError, *UNREADABLE):
        return None


def _shown(fields: _Fields, name: str) -> str:
    """The field's JSON for messages, its beginning if it is long."""
    return bytes(fields[name])[:100].decode(errors="replace") if name in fields else "none"
