"""Splits replies with the parser of a format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.choose import ReplyFormat, reply_format
from trunkline.plugins.generation.formats.regions import Regions
from trunkline.plugins.generation.formats.reply_parser import Piece, ReplyParser


class FakeTokenizer:
    """A tokenizer of a checkpoint with or without a response template."""

    chat_template = ""

    def __init__(self, template: dict[str, Any] | None = None) -> None:
        self.response_template = template


def make_form(tool: str, reasoning: str = "none", own: dict[str, Any] | None = None) -> ReplyFormat:
    tokenizer: Any = FakeTokenizer(own)
    return reply_format(tokenizer, "", tool, reasoning)


def make_parser(form: ReplyFormat, prompt: str, schemas: Mapping[str, Any]) -> ReplyParser:
    template = form.template(tools=True, reasoning=True)
    assert template is not None
    regions = Regions(template)
    return ReplyParser(form, regions, regions.after_anchor(prompt), schemas)


def split(form: ReplyFormat, prompt: str, chunks: Iterable[str], schemas: Mapping[str, Any]) -> list[Piece]:
    """The pieces of a reply; neighbouring ones of one kind are joined, and arguments with their call."""
    parser = make_parser(form, prompt, schemas)
    return joined([*(piece for chunk in chunks for piece in parser.feed(chunk)), *parser.finish()])


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else Piece("other")
        if piece.kind == "arguments":
            assert last.call is not None
            found[-1] = Piece("call", call=ToolCall(last.call.name, last.call.arguments + piece.text))
        elif piece.kind == last.kind and piece.call is None:
            found[-1] = Piece(piece.kind, last.text + piece.text)
        else:
            found.append(piece)
    return found


def cut(text: str, cuts: Iterable[int]) -> Iterator[str]:
    """The text in chunks."""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return (text[start:end] for start, end in pairwise(edges))
