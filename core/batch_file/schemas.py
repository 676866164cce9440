"""The lines of a file of answers, in the format of OpenAI's batches."""

from __future__ import annotations

import uuid
from typing import Any

from msgspec import Struct

PREFIX = "batch_req_"  # of the ids of answers, as OpenAI's begin


class LineError(Struct, frozen=True):
    """Why a line isn't a request that can be run. ``line``: its number, from 1."""

    code: str
    message: str
    line: int


class Response(Struct, frozen=True):
    """The server's response to a request. ``body``: JSON, or the text of a body that isn't JSON."""

    status_code: int
    request_id: str
    body: Any

    @property
    def failed(self) -> bool:
        return self.status_code >= 400


class BatchAnswer(Struct, frozen=True, kw_only=True):
    """A line of the file of answers: a response, or the error of a line that isn't a request."""

    id: str
    custom_id: str | None
    response: Response | None = None
    error: LineError | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.failed


def new_id() -> str:
    """A new id of an answer."""
    return PREFIX + uuid.uuid4().hex
