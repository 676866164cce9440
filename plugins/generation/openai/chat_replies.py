"""Replies and streams of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .replies import Replies, Unsent, finish_fields


class ChatReplies(Replies):
    """Each choice has a message, or in a stream the role, then deltas of its content, then the finish reason."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int, unsent: Unsent) -> dict[str, Any]:
        message = {"role": "assistant", "content": unsent.sequence.text}
        return {"message": message, "logprobs": None, **unsent.token_fields()}

    def first_choices(self, index: int) -> Iterator[dict[str, Any]]:
        yield {"delta": {"role": "assistant", "content": ""}}

    def next_choices(self, index: int, unsent: Unsent) -> Iterator[dict[str, Any]]:
        complete = unsent.sequence.complete  # it may end while the first chunk is sent, which this one isn't about
        text, fields = unsent.text(), unsent.token_fields()
        if text or fields:
            yield {"delta": {"content": text}, **fields}
        if complete:
            yield {"delta": {}, **finish_fields(unsent.sequence)}

    def prompt_fields(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.job.prompts[0]} if self.with_ids else {}
