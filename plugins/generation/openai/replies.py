"""Replies and streams of OpenAI's routes: what ``/v1/completions`` and ``/v1/chat/completions`` have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from trunkline.core.errors import RequestError
from trunkline.core.server.api import DONE, AnyRequest, EventStream, event_frame, json_response, while_connected
from trunkline.plugins.generation.reply_updates import as_updated
from trunkline.plugins.generation.sequence import OutputSequence, usage
from trunkline.plugins.generation.service import Job, Service

from .body_schemas import StreamOptions
from .chat_schemas import ChatBody
from .completion_schemas import CompletionBody
from .grammars import GrammarField, read_grammar
from .token_logprobs import LogprobReader


class Replies(ABC):
    """Makes the reply to a request, or the chunks of its stream, which have the same id, model and time.

    ``kind`` and ``chunk_kind`` are the values of ``object``.
    """

    kind: str
    chunk_kind: str

    def __init__(self, service: Service, job: Job, body: ChatBody | CompletionBody, rid: str) -> None:
        """``rid``: the id of the whole request, without the index of a sequence."""
        self.job = job
        self.with_ids = bool(body.return_token_ids)
        self.service = service
        self.grammar = read_grammar(body)
        self._stream = bool(body.stream)
        self._usage, self._continuous_usage = _usage_options(body.stream_options or StreamOptions())
        self._id = rid
        self._model = body.model or job.served.name
        self._created = int(time.time())

    async def response(self, request: AnyRequest) -> Any:
        """Run the job and answer ``request``."""
        with grammar_errors(self.grammar):
            if not self._stream:
                return json_response(await while_connected(request, self._completed()))
            sequences = await while_connected(request, self.service.submit_checked(self.job))
        return EventStream(self.chunks(sequences), lambda: self.service.close(sequences))

    async def _completed(self) -> dict[str, Any]:
        return await self.whole(await self.service.complete(self.job))

    async def whole(self, sequences: Sequence[OutputSequence]) -> dict[str, Any]:
        """The reply to a request without ``stream``."""
        unsent = [Unsent(sequence, with_ids=self.with_ids) for sequence in sequences]
        for index, each in enumerate(unsent):
            await self.read(index, each)
        choices = [
            {"index": index, **finish_fields(each.sequence), **self.choice(index, each)}
            for index, each in enumerate(unsent)
        ]
        meta = sequences[0].meta_info()
        metadata = {name: meta[name] for name in ("weight_version", "weight_versions") if name in meta}
        return self._with_choices(self.kind, choices) | {
            "usage": await self.usage(sequences),
            "metadata": metadata,
            **self.prompt_fields(),
        }

    async def chunks(self, sequences: Sequence[OutputSequence]) -> AsyncIterator[bytes]:
        """The frames of a stream: those of the choices; usage, if requested; ``[DONE]``.

        Raises the error of a sequence that failed.
        """
        unsent = [Unsent(sequence, with_ids=self.with_ids) for sequence in sequences]
        for index, each in enumerate(unsent):
            for choice in self.first_choices(index):
                yield self._chunk(index, choice, each.sequence, **(self.prompt_fields() if index == 0 else {}))
        async for index in refreshed(self.service, sequences, self.grammar):
            await self.read(index, unsent[index])
            for choice in self.next_choices(index, unsent[index]):
                yield self._chunk(index, choice, sequences[index])
        if self._usage:
            yield event_frame(self._with_choices(self.chunk_kind, []) | {"usage": await self.usage(sequences)})
        yield DONE

    async def read(self, index: int, unsent: Unsent) -> None:
        """Called with what is new of a sequence, before its choice or its next choices are made."""

    @abstractmethod
    def choice(self, index: int, unsent: Unsent) -> dict[str, Any]:
        """A choice of the reply, without its index; it may have another finish reason than the sequence."""

    @abstractmethod
    def first_choices(self, index: int) -> Iterable[dict[str, Any]]:
        """The choices of the chunks with which the stream of a sequence begins, before it has tokens."""

    @abstractmethod
    def next_choices(self, index: int, unsent: Unsent) -> Iterable[dict[str, Any]]:
        """The choices of the chunks for what is unsent of a sequence; the last has the finish reason."""

    async def usage(self, sequences: Sequence[OutputSequence]) -> dict[str, Any]:
        """The token counts of sequences that are complete."""
        return {**usage(sequences, self.job.n)}

    def prompt_fields(self) -> dict[str, Any]:
        """Fields of the reply, or of a stream's first chunk, that are about the prompt."""
        return {}

    def _chunk(self, index: int, choice: dict[str, Any], sequence: OutputSequence, **fields: Any) -> bytes:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        if self._usage:
            fields["usage"] = usage([sequence], 1) if self._continuous_usage else None
        return event_frame(self._with_choices(self.chunk_kind, [choice]) | fields)

    def _with_choices(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class Unsent:
    """What of a sequence, as of its last refresh, has not been sent yet."""

    def __init__(self, sequence: OutputSequence, *, with_ids: bool) -> None:
        self.sequence = sequence
        self._with_ids = with_ids
        self._reader = cast("LogprobReader | None", sequence.reader)
        self._characters = 0  # of the text that have been sent
        self._tokens = 0

    def text(self) -> str:
        """The new text."""
        text = (self.sequence.text or "")[self._characters :]
        self._characters += len(text)
        return text

    def token_fields(self) -> dict[str, Any]:
        """New log-probabilities and, if requested, token ids: fields of a choice that are set if there are any."""
        fields: dict[str, Any] = {}
        if self._reader is not None and (logprobs := self._reader.take()) is not None:
            fields["logprobs"] = logprobs
        if self._with_ids and (ids := self.sequence.reply.tokens[self._tokens :]):
            fields["token_ids"] = ids
            self._tokens += len(ids)
        return fields


async def refreshed(
    service: Service, sequences: Sequence[OutputSequence], grammar: GrammarField | None
) -> AsyncIterator[int]:
    """Indices of sequences that have been refreshed because something is new, and once each when it is complete.

    Raises the error of a sequence that failed; one about the ``grammar`` has the client's name of its field.
    """
    ended: set[int] = set()
    async for index in as_updated([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        if index in ended:
            continue  # it ended while its last update was read or sent
        if sequence.reader is None:
            sequence.refresh()
        else:
            await service.refresh(sequence)
        if sequence.complete:
            ended.add(index)
            with grammar_errors(grammar):
                sequence.raise_for_error()
        yield index


@contextmanager
def grammar_errors(grammar: GrammarField | None) -> Iterator[None]:
    """Give RequestErrors of the block that are about the request's grammar the client's name of its field."""
    try:
        yield
    except RequestError as error:
        if grammar is None or error.param != grammar.key:
            raise
        # One that the server has made of several fields has no name that a client could know.
        message = error.message.replace("lark", grammar.field, 1) if grammar.key == "lark" else error.message
        raise RequestError(
            message, status=error.status, param=grammar.field, code=error.code, retry_after=error.retry_after
        ) from None


def _usage_options(options: StreamOptions) -> tuple[bool, bool]:
    """Whether a stream ends with the usage, and whether then all its chunks have it."""
    return bool(options.include_usage), bool(options.continuous_usage_stats)


def finish_fields(sequence: OutputSequence) -> dict[str, Any]:
    """Why a sequence ended."""
    finish = sequence.finish or {}
    return {"finish_reason": finish.get("type"), "matched_stop": finish.get("matched")}


def request_ids(rid: str, count: int) -> list[str]:
    """The id of each sequence of a request."""
    return [rid] if count == 1 else [f"{rid}_{index}" for index in range(count)]
