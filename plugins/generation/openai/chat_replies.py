"""Replies and streams of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.model_format import ReplyReader
from trunkline.plugins.generation.sequence import OutputSequence
from trunkline.plugins.generation.service import Job, Service

from .chat_schemas import ChatBody
from .grammars import GrammarField
from .replies import Replies, Unsent, finish_fields
from .reply_pieces import ReplyPieces

FIELDS = {"content": "content", "reasoning": "reasoning_content"}


class ChatReplies(Replies):
    """Each choice has a message, or in a stream the role, then deltas of its content, then the finish reason.

    With a ``reader``, messages also have reasoning and tool calls.
    """

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, service: Service, job: Job, body: ChatBody, rid: str, reader: ReplyReader | None = None) -> None:
        super().__init__(service, job, body, rid)
        grammar = job.sampling[0].grammar
        if grammar is not None and grammar.kind == "lark":
            self.grammar = GrammarField("tools" if body.tools else "response_format", grammar.kind, grammar.text)
        hide, hold = body.include_reasoning is False, body.stream_reasoning is False
        self._pieces = [ReplyPieces(reader, hide_reasoning=hide, hold_reasoning=hold) for _ in job.rids]

    async def read(self, index: int, unsent: Unsent) -> None:
        await self._pieces[index].read(self.service.engine, unsent.text(), ended=unsent.sequence.complete)

    def choice(self, index: int, unsent: Unsent) -> dict[str, Any]:
        texts, calls = {"content": "", "reasoning_content": ""}, []
        for piece in self._pieces[index].take():
            if piece.call is not None:
                calls.append(self._call(index, piece.call))
            elif piece.kind in FIELDS:
                texts[FIELDS[piece.kind]] += piece.text
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message["tool_calls"] = calls
        return {"message": message, "logprobs": None, **unsent.token_fields()} | self._finish(index, unsent)

    def first_choices(self, index: int) -> Iterator[dict[str, Any]]:
        yield {"delta": {"role": "assistant", "content": ""}}

    def next_choices(self, index: int, unsent: Unsent) -> Iterator[dict[str, Any]]:
        complete = unsent.sequence.complete  # it may end while the first chunk is sent, which this one isn't about
        fields = unsent.token_fields()
        deltas = [*self._deltas(index)] or ([{"content": ""}] if fields else [])
        for delta in deltas:
            yield {"delta": delta, **fields}
            fields = {}
        if complete:
            yield {"delta": {}, **self._finish(index, unsent)}

    async def usage(self, sequences: Sequence[OutputSequence]) -> dict[str, Any]:
        counts, engine = await super().usage(sequences), self.service.engine
        each = [
            await pieces.count_reasoning(engine, sequence)
            for pieces, sequence in zip(self._pieces, sequences, strict=True)
        ]
        reasoning = [count for count in each if count is not None]
        return {**counts, "completion_tokens_details": {"reasoning_tokens": sum(reasoning)}} if reasoning else counts

    def prompt_fields(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.job.prompts[0]} if self.with_ids else {}

    def _finish(self, index: int, unsent: Unsent) -> dict[str, Any]:
        """Why a choice ended: "tool_calls" if it ended after calls."""
        fields = finish_fields(unsent.sequence)
        if self._pieces[index].calls and fields["finish_reason"] == "stop":
            fields["finish_reason"] = "tool_calls"
        return fields

    def _deltas(self, index: int) -> Iterator[dict[str, Any]]:
        """The deltas of the new pieces: for a call one with its name, then those with its arguments."""
        number = self._pieces[index].calls - 1
        for piece in self._pieces[index].take():
            arguments = piece.text if piece.kind == "arguments" else ""
            if piece.call is not None:
                number, arguments = number + 1, piece.call.arguments
                call = self._call(index, piece.call)
                head = {"index": number, **call, "function": {"name": piece.call.name, "arguments": ""}}
                yield {"tool_calls": [head]}
            elif piece.kind in FIELDS:
                yield {FIELDS[piece.kind]: piece.text}
            if arguments:
                yield {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._pieces[index].new_call_id(), "type": "function", "function": function}
