"""Reads a reply piece by piece: reasoning, content and tool calls as a request wants them."""

from __future__ import annotations

import secrets
import string

from trunkline.core.types import EngineClient
from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.model_format import ReplyReader, read_pieces
from trunkline.plugins.generation.formats.reply_parser import Piece
from trunkline.plugins.generation.sequence import OutputSequence

COUNT_COST = 32  # of decoding a text token by token, times that of decoding it at once
SHORT_ID = 9  # characters, for templates that take no other ids
LETTERS = string.ascii_letters + string.digits


class ReplyPieces:
    """The pieces of one reply. Without a ``reader`` all text is content.

    ``hide_reasoning``: leave it out. ``hold_reasoning``: it is one piece, that comes when it is complete.
    """

    def __init__(
        self, reader: ReplyReader | None, *, hide_reasoning: bool = False, hold_reasoning: bool = False
    ) -> None:
        self._reader = reader
        self._parser = None if reader is None else reader.parser()
        self._hide_reasoning = hide_reasoning
        self._hold_reasoning = hold_reasoning
        self._held: list[Piece] = []
        self._pieces: list[Piece] = []
        self.calls = 0  # that have been taken
        self._dropped = False  # the last call is left out

    async def read(self, engine: EngineClient, text: str, *, ended: bool) -> None:
        """Add the next part of the reply's text; ``ended``: it is the last."""
        if self._reader is None or self._parser is None:
            self._pieces += [Piece("content", text)] if text else []
            return
        if not text and not ended:
            return
        for piece in await read_pieces(engine, self._parser, text, ended=ended, slow=self._reader.form.own):
            if piece.kind == "reasoning":
                (self._held if self._hold_reasoning else self._pieces).append(piece)
            else:
                self._release()
                self._pieces.append(piece)
        if ended:
            self._release()

    def take(self) -> list[Piece]:
        """The new pieces; neighbouring texts of one kind are joined, and arguments with their call."""
        pieces: list[Piece] = []
        for piece in self._pieces:
            last = pieces[-1] if pieces else None
            if piece.call is not None:
                self._dropped = self.calls > 0 and self._reader is not None and not self._reader.many
                self.calls += not self._dropped
                pieces += [] if self._dropped else [piece]
            elif (piece.kind == "arguments" and self._dropped) or (piece.kind == "reasoning" and self._hide_reasoning):
                continue
            elif piece.kind == "arguments" and last is not None and last.call is not None:
                whole = ToolCall(last.call.name, last.call.arguments + piece.text)
                pieces[-1] = Piece("call", call=whole)
            elif last is not None and last.kind == piece.kind:
                pieces[-1] = Piece(piece.kind, last.text + piece.text)
            else:
                pieces.append(piece)
        self._pieces = []
        return pieces

    async def count_reasoning(self, engine: EngineClient, sequence: OutputSequence) -> int | None:
        """How many tokens of a complete sequence, which has this reply, are reasoning and its markers.

        None if the reasoning isn't separated.
        """
        if self._parser is None or not self._parser.separates_reasoning:
            return None
        spans = self._parser.reasoning()
        if not spans:
            return 0

        def count() -> int:
            counts = sequence.count_tokens([position for span in spans for position in span])
            return sum(counts[1::2]) - sum(counts[::2])

        tokens: int = await engine.off_loop(count, size=COUNT_COST * len(sequence.text or ""))
        return tokens

    def new_call_id(self) -> str:
        """An id for a tool call, in a form that the model's chat template takes."""
        tool = None if self._reader is None else self._reader.form.tool
        if tool is not None and tool.short_ids:
            return "".join(secrets.choice(LETTERS) for _ in range(SHORT_ID))
        return f"call_{secrets.token_hex(12)}"

    def _release(self) -> None:
        self._pieces += self._held
        self._held = []
