"""Hostile outputs: patterns have a time limit, regions a size limit, and no error escapes the parser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plugins.generation.formats.splitting import make_form, split
from trunkline.plugins.generation.formats import closing, regions
from trunkline.plugins.generation.formats.calls import ToolCall
from trunkline.plugins.generation.formats.closing import JSON_STRING
from trunkline.plugins.generation.formats.patterns import TooSlow
from trunkline.plugins.generation.formats.reply_parser import Piece
from trunkline.plugins.generation.formats.templates import CALL, TOOL_FORMATS


def _split(text: str, tool: str = "auto", own: dict[str, Any] | None = None) -> list[Piece]:
    return split(make_form(tool, "auto", own), "", [text], {"f": {}})


def _own(**field: Any) -> dict[str, Any]:
    return {"start_anchor": "A:", "fields": {"tool_calls": {"close": "</c>", "repeats": True, **field}, "content": {}}}


def test_a_slow_element_of_a_checkpoint_is_stopped() -> None:
    tag = r"(?:a|a)*[bc]d(?P<key>q)(?P<value>.*)"
    own = _own(open_pattern="<c>(?P<name>)", content="xml-inline", content_args={"tag_pattern": tag}, transform=CALL)
    with pytest.raises(TooSlow):
        _split("<c>" + "a" * 60 + "be</c>", own=own)


def test_a_slow_marker_of_a_checkpoint_is_stopped() -> None:
    own = _own(open_pattern=r"(?:a|a)*[bc]d", content="json")
    with pytest.raises(TooSlow, match=r"took more than 0.25 s .* --tool-call-parser"):
        _split("a" * 60 + "be", own=own)


SLOW = r"(?P<value>(?:x|x)*[yz]w)"


@pytest.mark.parametrize(
    "arguments",
    [
        {"tag_pattern": f"<p=(?P<key>q)>{SLOW}"},
        {
            "tag_pattern": "(?P<key>q)(?P<value>.*)",
            "value_parser": {"name": "xml-inline", "args": {"tag_pattern": f"(?P<key>>){SLOW}"}},
        },
    ],
)
def test_a_slow_content_of_a_checkpoint_is_no_call(arguments: dict[str, Any]) -> None:
    text = f"<c><p=q>{'x' * 60}yx</c>"
    form = _own(open_pattern="<c>(?P<name>)", content="xml-inline", content_args=arguments, transform=CALL)
    assert _split(text, own=form) == [Piece("content", text.removesuffix("</c>") + "</c>")]


@pytest.mark.parametrize("tag", [r"<p=(?P<key>q)>(?P<value>.*?)</p>", r"<p=(?P<key>q)>(?:(?P<value>.*?))</p>"])
def test_values_of_a_checkpoint_s_elements(tag: str) -> None:
    field = {"open_pattern": "<c>(?P<name>f)", "content": "xml-inline", "content_args": {"tag_pattern": tag}}
    [piece] = _split('<c>f<p=q>["a"]</p></c>', own=_own(**field, transform=CALL))
    assert piece.call == ToolCall("f", '{"q": "[\\"a\\"]"}')


def test_a_region_over_the_limit_is_content(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<tool_call>{"arguments": {"x": "abc"}, "name": "f"}</tool_call>'
    size = len(text) - len("<tool_call></tool_call>")
    monkeypatch.setattr(regions, "MAX_REGION", size)
    assert [piece.kind for piece in _split(text, "hermes")] == ["call"]
    monkeypatch.setattr(regions, "MAX_REGION", size - 1)
    assert _split(text, "hermes") == [Piece("content", text)]


@pytest.mark.parametrize("tool", TOOL_FORMATS)
@pytest.mark.parametrize(
    "body",
    [
        "[" * 50_000,
        '{"a":' * 50_000,
        "9" * 20_000,
        "<arg_key>" * 5_000,
        "<parameter=a>" * 5_000,
        " " * 50_000,
        "{" * 50_000,
    ],
)
def test_built_in_formats_take_hostile_bodies(tool: str, body: str) -> None:
    begin, _, end = (
        TOOL_FORMATS[tool].call.replace("{{", "{").replace("}}", "}").replace("{name}", "f").partition("{arguments}")
    )
    text = TOOL_FORMATS[tool].begin + begin + body + end + TOOL_FORMATS[tool].end
    assert all(piece.kind in ("content", "call") for piece in _split(text, tool))


def test_a_string_after_many_closing_markers_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        read = 0

        def match(self, text: str, position: int) -> Any:
            found = JSON_STRING.match(text, position)
            assert found is not None
            self.read += len(found.group())
            return found

    text = '<tool_call>{\\"a</tool_call>' * 100
    counting = Counting()
    monkeypatch.setattr(closing, "JSON_STRING", counting)
    assert _split(text, "hermes") == [Piece("content", text)]
    assert 0 < counting.read < len(text)
