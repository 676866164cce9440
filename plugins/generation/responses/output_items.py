"""The items of a response: made from the pieces of a reply, with the events of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.reply_parser import Piece

PREFIXES = {"content": "msg", "reasoning": "rs"}
NAMES = {"content": "output_text", "reasoning": "reasoning_text"}


class OutputItems:
    """Collects the items of one response in ``output``. Its methods yield events, without their sequence numbers."""

    def __init__(self, rid: str) -> None:
        self.output: list[dict[str, Any]] = []
        self._rid = rid
        self._kind = ""  # of the open item: "content", "reasoning", "call" or none
        self._texts: list[str] = []

    def add(self, piece: Piece, call_id: str) -> Iterator[dict[str, Any]]:
        """Add a piece; ``call_id`` is the id of its call, if it has one."""
        if piece.call is not None:
            yield from self._end_item("completed")
            yield from self._begin_call(piece.call, call_id)
            return
        if piece.kind == "arguments":
            yield from self._add_arguments(piece.text)
            return
        if piece.kind not in NAMES:
            return
        if piece.kind != self._kind:
            yield from self._end_item("completed")
            yield from self._begin_text(piece.kind)
        self._texts.append(piece.text)
        fields: dict[str, Any] = {"logprobs": []} if piece.kind == "content" else {}
        yield self._text_event("delta", delta=piece.text, **fields)

    def end(self, status: str) -> Iterator[dict[str, Any]]:
        """End the last item, with this status. A response without items gets an empty message."""
        if not self.output:
            yield from self._begin_text("content")
        yield from self._end_item(status)

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    def _begin_text(self, kind: str) -> Iterator[dict[str, Any]]:
        self._kind, self._texts = kind, []
        item: dict[str, Any] = {"id": f"{PREFIXES[kind]}_{self._rid}_{len(self.output)}", "status": "in_progress"}
        if kind == "content":
            item |= {"type": "message", "role": "assistant", "content": []}
        else:
            item |= {"type": "reasoning", "summary": [], "content": []}
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": self._index, "item": dict(item)}
        yield self._part_event("added")

    def _end_item(self, status: str) -> Iterator[dict[str, Any]]:
        if self._kind:
            yield from (self._end_call if self._kind == "call" else self._end_text)(status)
        self._kind = ""

    def _end_text(self, status: str) -> Iterator[dict[str, Any]]:
        fields: dict[str, Any] = {"logprobs": []} if self._kind == "content" else {}
        yield self._text_event("done", text="".join(self._texts), **fields)
        yield self._part_event("done")
        item = self.output[-1]
        item |= {"status": status, "content": [self._part()]}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def _begin_call(self, call: ToolCall, call_id: str) -> Iterator[dict[str, Any]]:
        self._kind, self._texts = "call", []
        item = {
            "id": f"fc_{self._rid}_{len(self.output)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": call.name,
            "arguments": "",
        }
        self.output.append(item)
        yield {"type": "response.output_item.added", "output_index": self._index, "item": dict(item)}
        if call.arguments:
            yield from self._add_arguments(call.arguments)

    def _add_arguments(self, text: str) -> Iterator[dict[str, Any]]:
        self._texts.append(text)
        yield {"type": "response.function_call_arguments.delta", **self._item_place(), "delta": text}

    def _end_call(self, status: str) -> Iterator[dict[str, Any]]:
        item = self.output[-1]
        item |= {"status": status, "arguments": "".join(self._texts)}
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield {"type": "response.function_call_arguments.done", **self._item_place(), **done}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": NAMES[self._kind], "text": "".join(self._texts)}
        return part | ({"annotations": [], "logprobs": []} if self._kind == "content" else {})

    def _item_place(self) -> dict[str, Any]:
        return {"output_index": self._index, "item_id": self.output[-1]["id"]}

    def _place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}

    def _part_event(self, step: str) -> dict[str, Any]:
        return {"type": f"response.content_part.{step}", **self._place(), "part": self._part()}

    def _text_event(self, step: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{NAMES[self._kind]}.{step}", **self._place(), **fields}
