"""Replies and streams of ``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trunkline.plugins.generation.service import Job, Service

from .completion_schemas import CompletionBody
from .replies import Replies, Unsent, finish_fields


class CompletionReplies(Replies):
    """Each choice has a text, which begins with the prompt if the request has ``echo``; in a stream, its parts."""

    kind = chunk_kind = "text_completion"

    def __init__(self, service: Service, job: Job, body: CompletionBody, rid: str, echoed: Sequence[str]) -> None:
        """``echoed``: the text of each prompt, empty without ``echo``."""
        super().__init__(service, job, body, rid)
        self._echoed = echoed
        self._begun: set[int] = set()  # sequences whose first chunk was sent

    def choice(self, index: int, unsent: Unsent) -> dict[str, Any]:
        return {"text": self._before(index) + unsent.text(), "logprobs": None, **self._fields(index, unsent)}

    def first_choices(self, index: int) -> Iterator[dict[str, Any]]:
        return iter(())

    def next_choices(self, index: int, unsent: Unsent) -> Iterator[dict[str, Any]]:
        complete = unsent.sequence.complete
        if index not in self._begun and not (complete or unsent.sequence.reply.tokens):
            return  # with the first token, all log-probabilities of the prompt are known
        text, fields = unsent.text(), self._fields(index, unsent)
        if index not in self._begun:
            text = self._before(index) + text
            self._begun.add(index)
        if text or fields or complete:
            yield {"text": text, **fields, **(finish_fields(unsent.sequence) if complete else {})}

    def _before(self, index: int) -> str:
        """The text that precedes the output of a sequence."""
        return self._echoed[index // self.job.n]

    def _fields(self, index: int, unsent: Unsent) -> dict[str, Any]:
        fields = unsent.token_fields()
        if self.with_ids and index not in self._begun:
            fields["prompt_token_ids"] = self.job.prompts[index // self.job.n]
        return fields
