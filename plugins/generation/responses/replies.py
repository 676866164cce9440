"""Replies and event streams of ``/v1/responses``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.server.api import AnyRequest, EventStream, encode_json, json_response, while_connected
from trunkline.plugins.generation.formats.model_format import ReplyReader
from trunkline.plugins.generation.openai.grammars import GrammarField
from trunkline.plugins.generation.openai.replies import grammar_errors, refreshed
from trunkline.plugins.generation.openai.reply_pieces import ReplyPieces
from trunkline.plugins.generation.sequence import OutputSequence, usage
from trunkline.plugins.generation.service import Job, Service

from .chat_body import effort
from .output_items import OutputItems
from .schemas import ResponsesBody

STATUS = {"stop": "completed", "length": "incomplete"}  # by finish reason; others are "cancelled"


class ResponseReply:
    """Makes the response to one request, or the events of its stream."""

    def __init__(self, service: Service, job: Job, body: ResponsesBody, rid: str, reader: ReplyReader | None) -> None:
        self._service = service
        self._job = job
        self._stream = bool(body.stream)
        grammar = job.sampling[0].grammar
        field = "tools" if body.tools else "text.format"
        self._grammar = None if grammar is None else GrammarField(field, grammar.kind, grammar.text)
        self._pieces = ReplyPieces(reader)
        self._items = OutputItems(rid.removeprefix("resp_"))
        self._fields = {"id": rid, "object": "response", "created_at": int(time.time()), **_settings(body, job)}

    async def response(self, request: AnyRequest) -> Any:
        """Run the job and answer ``request``."""
        with grammar_errors(self._grammar):
            if not self._stream:
                return json_response(await while_connected(request, self._whole()))
            sequences = await while_connected(request, self._service.submit_checked(self._job))
        return EventStream(self._frames(sequences), lambda: self._service.close(sequences))

    async def _whole(self) -> dict[str, Any]:
        [sequence] = await self._service.complete(self._job)
        await self._pieces.read(self._service.engine, sequence.text or "", ended=True)
        for _ in self._events(ended=sequence):
            pass
        return await self._completed(sequence)

    async def _frames(self, sequences: list[OutputSequence]) -> AsyncIterator[bytes]:
        """The events as frames, with their numbers. A failure is the last event of the stream."""
        number = 0
        async for event in self._events_of(sequences):
            frame = encode_json({"type": event["type"], "sequence_number": number, **event})
            yield b"event: " + event["type"].encode() + b"\ndata: " + frame + b"\n\n"
            number += 1

    async def _events_of(self, sequences: list[OutputSequence]) -> AsyncIterator[dict[str, Any]]:
        [sequence] = sequences
        for step in ("created", "in_progress"):
            yield {"type": f"response.{step}", "response": self._begun()}
        sent = 0
        try:
            async for _ in refreshed(self._service, sequences, self._grammar):
                text, ended = sequence.text or "", sequence.complete
                await self._pieces.read(self._service.engine, text[sent:], ended=ended)
                sent = len(text)
                for event in self._events(ended=sequence if ended else None):
                    yield event
        except RequestError as error:
            code = "server_error" if error.status >= 500 else "invalid_prompt"
            failed = self._begun() | {"status": "failed", "error": {"code": code, "message": error.message}}
            yield {"type": "response.failed", "response": failed}
            return
        response = await self._completed(sequence)
        kind = response["status"] if response["status"] == "completed" else "incomplete"
        yield {"type": f"response.{kind}", "response": response}

    def _events(self, *, ended: OutputSequence | None) -> Iterator[dict[str, Any]]:
        """The events of the new pieces; with a sequence, which has ended, also those of the end."""
        for piece in self._pieces.take():
            yield from self._items.add(piece, self._pieces.new_call_id() if piece.call is not None else "")
        if ended is not None:
            yield from self._items.end("completed" if _status(ended) == "completed" else "incomplete")

    def _begun(self) -> dict[str, Any]:
        """The response object before the end."""
        return self._fields | {"status": "in_progress", "incomplete_details": None, "output": [], "usage": None}

    async def _completed(self, sequence: OutputSequence) -> dict[str, Any]:
        """The response object at the end of the sequence."""
        status = _status(sequence)
        reasoning = await self._pieces.count_reasoning(self._service.engine, sequence)
        return self._fields | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.output,
            "usage": _usage(sequence, reasoning),
        }


def _settings(body: ResponsesBody, job: Job) -> dict[str, Any]:
    """The fields of a response that repeat the request, with the server's defaults."""
    sampling = job.sampling[0]
    return {
        "background": False,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model or job.served.name,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort(body.reasoning) if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }


def _status(sequence: OutputSequence) -> str:
    return STATUS.get((sequence.finish or {}).get("type", ""), "cancelled")


def _usage(sequence: OutputSequence, reasoning: int | None) -> dict[str, Any]:
    """OpenAI's token counts; the field of the reasoning's tokens can't be left out."""
    counts = usage([sequence], 1)
    cached = sequence.reply.cached_tokens
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning or 0},
        "total_tokens": counts["total_tokens"],
    }
