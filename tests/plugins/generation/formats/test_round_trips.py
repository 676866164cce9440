"""Arguments that a forced call's grammar admits come back as they were, whole and in any chunks."""

from __future__ import annotations

import json
from typing import Any

import llguidance.hf
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.plugins.generation.formats.splitting import cut, make_form, split
from trunkline.plugins.generation.formats.grammars import ELEMENTS, STRICT, forced_calls
from trunkline.plugins.generation.formats.templates import TOOL_FORMATS, ToolFormat

CHOICES = ["a", "1", 2, None, "{", '["', "true"]  # written differently, all of them
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "items": {"type": "array", "items": {"type": ["string", "object", "null"]}},
        "choice": {"enum": CHOICES},
        "more": {"type": "object"},
        "last": {"type": "string"},
    },
    "required": ["text"],
    "additionalProperties": False,
}
SCHEMAS = {"f": SCHEMA, "g": {"type": "object", "properties": {}, "additionalProperties": False}}
FIELDS = {name: f"tools[{index}].function.parameters" for index, name in enumerate(SCHEMAS)}
SEPARATORS = (STRICT["item_separator"], STRICT["key_separator"])


@pytest.fixture(scope="module")
def matchers(byte_level: Any) -> dict[str, LLMatcher]:
    """For each format what tells whether a text is in the grammar of its calls."""
    table = llguidance.hf.from_tokenizer(byte_level)
    grammars = {
        name: forced_calls(make_form(name), SCHEMAS, {}, fields=FIELDS, many=True, in_reasoning=False)
        for name in TOOL_FORMATS
    }
    return {name: LLMatcher(table, LLMatcher.grammar_from_lark(grammar)) for name, grammar in grammars.items()}


def _texts(tool: ToolFormat) -> st.SearchStrategy[str]:
    """Texts with the format's markers."""
    written = tool.begin + tool.call.format(name="g", arguments="{}") + tool.end
    markers = [written, *written.split("{}"), *tool.content_close, "</parameter>", "</function>", "</arg_value>"]
    markers += [marker for field in tool.fields.values() for marker in _closing(field)]
    markers += ["<parameter=a>", "<arg_key>a</arg_key>", "[TOOL_CALLS]", '<|"|>', "<escape>", "<", "{", "[", '"', "\\"]
    return st.lists(st.sampled_from([*markers, "\n", "a", " ", "é", "🙂", "</", "\t"]), max_size=6).map("".join)


def _closing(field: dict[str, Any]) -> list[str]:
    close = field.get("close", [])
    return [close] if isinstance(close, str) else close


def _written(tool: ToolFormat, arguments: dict[str, Any]) -> str:
    """A call with these arguments as the format writes it."""
    if tool.values == "json":
        return tool.call.format(name="f", arguments=json.dumps(arguments, ensure_ascii=False, separators=SEPARATORS))
    form = ELEMENTS[tool.values]
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=SEPARATORS)
        for key, value in arguments.items()
    }
    return tool.call.format(
        name="f",
        arguments="".join(f"{form.before}{key}{form.between}{text}{form.after}" for key, text in texts.items()),
    )


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(data=st.data())
@settings(max_examples=8, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture])
def test_round_trip(name: str, matchers: dict[str, LLMatcher], byte_level: Any, data: st.DataObject) -> None:
    tool, form = TOOL_FORMATS[name], make_form(name)
    texts = _texts(tool)
    arguments: dict[str, Any] = {"text": data.draw(texts)}
    values: dict[str, st.SearchStrategy[Any]] = {
        "items": st.lists(st.one_of(texts, st.none(), st.dictionaries(texts, texts, max_size=2)), max_size=3),
        "choice": st.sampled_from(CHOICES),
        "more": st.dictionaries(texts, texts, max_size=2),
        "last": texts,
    }
    for key in data.draw(st.sets(st.sampled_from([*values]))):
        arguments[key] = data.draw(values[key])
    arguments = {key: arguments[key] for key in SCHEMA["properties"] if key in arguments}
    call = _written(tool, arguments)
    text = tool.begin + call + tool.separator + call + tool.end
    matcher = matchers[name].deep_copy()
    ids = byte_level.encode(text, add_special_tokens=False)
    admitted = matcher.try_consume_tokens(ids) == len(ids)
    assert admitted or tool.values != "json", text
    assume(admitted)
    for chunks in ([text], [*text], [*cut(text, data.draw(st.lists(st.integers(0, 1 << 16), max_size=8)))]):
        pieces = split(form, "", chunks, SCHEMAS)
        calls = [piece.call for piece in pieces if piece.call is not None]
        assert [json.loads(each.arguments) for each in calls] == [arguments, arguments], (text, pieces)
        assert len(pieces) == 2
