"""Replies are split as recorded for every format, and equally under any chunking."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.generation.formats.outputs import BREAKING, RECORDED, SCHEMAS, Recorded
from tests.plugins.generation.formats.splitting import cut, make_form, make_parser, split
from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.choose import ReplyFormat
from trunkline.plugins.generation.formats.reply_parser import Piece

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


def _form(recorded: Recorded, own: dict[str, Any] | None = None) -> ReplyFormat:
    return make_form("auto", "auto", own) if own else make_form(recorded.tool, recorded.reasoning)


def _split(form: ReplyFormat, prompt: str, chunks: Iterable[str]) -> list[Piece]:
    return split(form, prompt, chunks, SCHEMAS)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_recorded_outputs(recorded: Recorded) -> None:
    pieces = _split(_form(recorded), recorded.prompt, [recorded.output])
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == recorded.content
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == recorded.thoughts
    assert [(piece.call.name, piece.call.arguments) for piece in pieces if piece.call] == recorded.calls


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_truncations_give_the_same_in_single_characters(recorded: Recorded) -> None:
    form, length = _form(recorded), len(recorded.output)
    for end in range(length % 4, length + 1, 4):
        text = recorded.output[:end]
        assert _split(form, recorded.prompt, text) == _split(form, recorded.prompt, [text]), text


@pytest.mark.field  # a stream and the whole reply differed in other servers
@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
@given(data=st.data())
@settings(max_examples=40)
def test_broken_outputs_don_t_depend_on_the_chunks(recorded: Recorded, data: st.DataObject) -> None:
    fragments = st.sampled_from([*PIECES.findall(recorded.output), *BREAKING, recorded.output])
    text = "".join(data.draw(st.lists(fragments, max_size=30)))
    chunks = cut(text, data.draw(st.lists(st.integers(0, 1 << 16), max_size=20)))
    form = _form(recorded)
    assert _split(form, recorded.prompt, chunks) == _split(form, recorded.prompt, [text])


@pytest.mark.parametrize("name", ["hermes-thinking", "hermes-text-between", "hermes-cut", "hermes-plain"])
@given(data=st.data())
@settings(max_examples=60)
def test_templates_of_checkpoints_don_t_depend_on_the_chunks(name: str, data: st.DataObject) -> None:
    recorded = RECORDED[name]
    fragments = st.sampled_from([*PIECES.findall(recorded.output), *BREAKING, recorded.output, "<|im_end|>"])
    text = "".join(data.draw(st.lists(fragments, max_size=30)))
    chunks = cut(text, data.draw(st.lists(st.integers(0, 1 << 16), max_size=20)))
    form = _form(recorded, CHECKPOINT)
    assert _split(form, recorded.prompt, chunks) == _split(form, recorded.prompt, [text])


def test_arguments_come_as_they_are_written() -> None:
    parser = make_parser(make_form("hermes"), "", SCHEMAS)
    assert parser.feed('Hm <tool_call>{"name": "get_weather", "argu') == [Piece("content", "Hm")]
    assert parser.feed('ments": {"city": "Ro') == [
        Piece("call", call=ToolCall("get_weather", "")),
        Piece("arguments", '{"city": "Ro'),
    ]
    assert parser.feed('me\\"}') == [Piece("arguments", 'me\\"}')]
    assert parser.feed('"} }') == [Piece("arguments", '"}')]
    assert parser.feed("</tool_call>") == parser.finish() == []


def test_a_call_that_the_prompt_begins_is_complete_in_the_reply() -> None:
    prompt = '<|im_start|>assistant\n<tool_call>{"name": "get_weather", "arguments": {"city": "Ro'
    pieces = _split(make_form("hermes"), prompt, ['me"}', "}</tool_call>"])
    assert pieces == [Piece("call", call=ToolCall("get_weather", '{"city": "Rome"}'))]


@pytest.mark.parametrize(
    ("prompt", "text", "spans"),
    [
        ("", "Hi", []),
        ("", "a<think>b</think>c<think>d", ["<think>b</think>", "<think>d"]),
        ("<|im_start|>assistant\n<think>\n", "b</think>c", ["b</think>"]),
        ("<|im_start|>assistant\n<think>\n\n</think>", "c", []),
    ],
)
def test_where_the_reasoning_is(prompt: str, text: str, spans: list[str]) -> None:
    for chunks in (text, [text]):
        parser = make_parser(make_form("hermes", "qwen3"), prompt, SCHEMAS)
        for chunk in chunks:
            parser.feed(chunk)
        parser.finish()
        assert [text[start:end] for start, end in parser.reasoning()] == spans


def test_nothing_of_the_prompt_is_in_the_reply() -> None:
    form = _form(RECORDED["hermes-thinking"])
    prompt = '<tool_call>{"name": "now"}</tool_call><think>no<|im_start|>assistant\n<think>\nGiven. '
    pieces = _split(form, prompt, ["Mine.\n</think>\nYes"])
    assert pieces == [Piece("reasoning", "Mine."), Piece("content", "Yes")]
