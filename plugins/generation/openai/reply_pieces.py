"""Reads a reply piece by piece: reasoning, content and tool calls as a request wants them."""

from __future__ import annotations

import secrets
import string
from itertools import groupby

from trunkline.core.types import EngineClient
from trunkline.plugins.generation.formats.model_format import ReplyReader, read_pieces
from trunkline.plugins.generation.formats.reply_parser import Piece

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
        """The new pieces; neighbouring texts of one kind are joined."""
        pieces: list[Piece] = []
        for kind, group in groupby(self._pieces, lambda piece: piece.kind):
            if kind != "call":
                text = "".join(piece.text for piece in group)
                pieces += [] if kind == "reasoning" and self._hide_reasoning else [Piece(kind, text)]
                continue
            for piece in group:
                if self.calls == 0 or (self._reader is not None and self._reader.many):
                    self.calls += 1
                    pieces.append(piece)
        self._pieces = []
        return pieces

    def new_call_id(self) -> str:
        """An id for a tool call, in a form that the model's chat template takes."""
        tool = None if self._reader is None else self._reader.form.tool
        if tool is not None and tool.short_ids:
            return "".join(secrets.choice(LETTERS) for _ in range(SHORT_ID))
        return f"call_{secrets.token_hex(12)}"

    def _release(self) -> None:
        self._pieces += self._held
        self._held = []
