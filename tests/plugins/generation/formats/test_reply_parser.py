"""Replies are split as recorded for every format, and equally under any chunking."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.generation.formats.outputs import BREAKING, RECORDED, SCHEMAS, Recorded
from trunkline.plugins.generation.formats.choose import ReplyFormat, reply_format
from trunkline.plugins.generation.formats.regions import Regions
from trunkline.plugins.generation.formats.reply_parser import Piece, ReplyParser

PIECES = re.compile(r"<[^<>]*>|\[[A-Z_]+\]|\w+|\s+|.", re.DOTALL)

CHECKPOINT = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
    },
}
"""As checkpoints may have it: with white space before markers."""


class _Tokenizer:
    chat_template = ""
    response_template: dict[str, Any] | None = None


def _form(recorded: Recorded, own: dict[str, Any] | None = None) -> ReplyFormat:
    tokenizer: Any = _Tokenizer()
    tokenizer.response_template = own
    names = ("auto", "auto") if own else (recorded.tool, recorded.reasoning)
    return reply_format(tokenizer, "", *names)


def _split(form: ReplyFormat, prompt: str, chunks: Iterable[str]) -> list[Piece]:
    """The pieces of a reply; neighbouring ones of one kind are joined."""
    template = form.template(tools=True, reasoning=True)
    assert template is not None
    regions = Regions(template)
    parser = ReplyParser(form, regions, regions.after_anchor(prompt), SCHEMAS)
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)] + parser.finish()
    joined = []
    for kind, group in groupby(pieces, lambda piece: piece.kind):
        members = list(group)
        text = Piece(kind, "".join(piece.text for piece in members))
        joined += members if kind == "call" else [text]
    return joined


def _cut(text: str, cuts: Iterable[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_recorded_outputs(recorded: Recorded) -> None:
    pieces = _split(_form(recorded), recorded.prompt, [recorded.output])
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == recorded.content
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == recorded.thoughts
    assert [(piece.call.name, piece.call.arguments) for piece in pieces if piece.call] == recorded.calls


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_every_truncation_gives_the_same_in_single_characters(recorded: Recorded) -> None:
    form = _form(recorded)
    for end in range(len(recorded.output) + 1):
        text = recorded.output[:end]
        assert _split(form, recorded.prompt, text) == _split(form, recorded.prompt, [text]), text


@pytest.mark.field  # a stream and the whole reply differed in other servers
@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
@given(data=st.data())
@settings(max_examples=60)
def test_broken_outputs_don_t_depend_on_the_chunks(recorded: Recorded, data: st.DataObject) -> None:
    fragments = st.sampled_from([*PIECES.findall(recorded.output), *BREAKING, recorded.output])
    text = "".join(data.draw(st.lists(fragments, max_size=30)))
    chunks = _cut(text, data.draw(st.lists(st.integers(0, 1 << 16), max_size=20)))
    form = _form(recorded)
    assert _split(form, recorded.prompt, chunks) == _split(form, recorded.prompt, [text])


@pytest.mark.parametrize("name", ["hermes-thinking", "hermes-text-between", "hermes-cut", "hermes-plain"])
@given(data=st.data())
@settings(max_examples=60)
def test_templates_of_checkpoints_don_t_depend_on_the_chunks(name: str, data: st.DataObject) -> None:
    recorded = RECORDED[name]
    fragments = st.sampled_from([*PIECES.findall(recorded.output), *BREAKING, recorded.output, "<|im_end|>"])
    text = "".join(data.draw(st.lists(fragments, max_size=30)))
    chunks = _cut(text, data.draw(st.lists(st.integers(0, 1 << 16), max_size=20)))
    form = _form(recorded, CHECKPOINT)
    assert _split(form, recorded.prompt, chunks) == _split(form, recorded.prompt, [text])


def test_nothing_of_the_prompt_is_in_the_reply() -> None:
    form = _form(RECORDED["hermes-thinking"])
    prompt = '<tool_call>{"name": "now"}</tool_call><think>no<|im_start|>assistant\n<think>\nGiven. '
    pieces = _split(form, prompt, ["Mine.\n</think>\nYes"])
    assert pieces == [Piece("reasoning", "Mine."), Piece("content", "Yes")]
