"""Grammars that force tool calls in a model's own format, with arguments that are valid for the tools' schemas.

They are in the dialect of Lark's syntax that llguidance has: ``%json`` is a JSON value for a schema, ``<[7]>`` is the
special token with id 7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.grammar.json_schema import OPTIONS, checked_schema

from .calls import choices_of, plain_text, schema_types
from .choose import ReplyFormat
from .templates import ToolFormat

MAX_FORCED = 16  # calls of one reply
ARGUMENTS = "\0"  # where the arguments are in the text of a call
# JSON as chat templates write it, without white space that a model could repeat forever.
STRICT = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": OPTIONS["json_allowed_escapes"],
}
NOTES = {"description", "title", "default", "examples", "deprecated", "$comment", "readOnly", "writeOnly"}
OBJECT_KEYS = NOTES | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
}


class Elements(Struct, frozen=True):
    """How an argument that isn't JSON is written: what is ``before`` its name, ``between`` that and the value, and
    ``after`` it; and expressions for values that are ``text``, which has no escapes, and for names (``key``)."""

    before: str
    between: str
    after: str
    text: str
    key: str


ELEMENTS = {
    "qwen": Elements("<parameter=", ">\n", "\n</parameter>\n", r"([^<]|<[^<\/p])*", r"[^>\n]{1,256}"),
    "glm": Elements("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", r"([^<]|<[^<\/a])*", r"[^<]{1,256}"),
}


def forced_answer(schema: str, form: ReplyFormat, special: Mapping[str, int], *, in_reasoning: bool) -> str:
    """A grammar for an answer that is JSON for ``schema`` (JSON text); arguments as for :func:`forced_calls`."""
    thoughts = [*_thoughts(form, _Terms(special), in_reasoning=in_reasoning)]
    answer = f"answer: {_json('response_format', _object(schema))}"
    return "\n".join([f"start: {'thoughts' if thoughts else ''} answer", *thoughts, "// response_format", answer])


def forced_calls(
    form: ReplyFormat,
    tools: Mapping[str, Any],
    special: Mapping[str, int],
    *,
    fields: Mapping[str, str],
    many: bool,
    in_reasoning: bool,
    answer: str | None = None,
) -> str:
    """A grammar for calls of ``tools``: one, or up to 16 with ``many``; before them, the model may reason.

    ``tools``: JSON Schemas of the arguments by name; ``fields``: where the client has sent them. ``special``: ids of
    the tokenizer's special tokens by their text. ``in_reasoning``: the prompt ends inside the reasoning. ``answer``:
    JSON Schema, as text, of an answer that the model may give instead of calls. RequestError for a schema that the
    format can't enforce.
    """
    tool = form.tool
    if tool is None:
        raise RequestError(
            "tool_choice can force no calls: the syntax of this model's tool calls isn't known; use auto, or start the "
            "server with --tool-call-parser.",
            param="tool_choice",
        )
    terms = _Terms(special)
    rules = []
    for index, (name, schema) in enumerate(tools.items()):
        before, after = tool.call.format(name=name, arguments=ARGUMENTS).split(ARGUMENTS)
        rules.append(f"call_{index}: {terms.of(before)} arguments_{index} {terms.of(after)}")
        rules += [f"// {fields[name]}", *_arguments(index, fields[name], schema, tool, terms)]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    more = f"({terms.of(tool.separator)} call){{0,{MAX_FORCED - 1}}}" if many else ""
    thoughts = [*_thoughts(form, terms, in_reasoning=in_reasoning)]
    start = f"start: {'thoughts' if thoughts else ''} {'calls' if answer is None else '(calls | answer)'}"
    rules += [] if answer is None else ["// response_format", f"answer: {_json('response_format', _object(answer))}"]
    all_calls = f"calls: {terms.of(tool.begin)} call {more} {terms.of(tool.end)}"
    return "\n".join([start, *thoughts, all_calls, f"call: {calls}", *rules])


class _Terms:
    """Translates texts to the terms of a rule, with special tokens as such."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None

    def of(self, text: str) -> str:
        parts = [text] if self._split is None else self._split.split(text)
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else _quoted(part) for part in parts if part
        )

    def has_special(self, text: str) -> bool:
        return self._split is not None and self._split.search(text) is not None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text as part of a regular expression between slashes."""
    return re.sub(r"[/.?*+|(){}\[\]\\^$]", r"\\\g<0>", text).replace("\n", "\\n")


def _thoughts(form: ReplyFormat, terms: _Terms, *, in_reasoning: bool) -> Iterator[str]:
    """Rules for the reasoning before the calls: optional, or the rest of it if the prompt has begun it."""
    if form.thoughts is None:
        return
    begin, end = form.thoughts.text
    first = re.match(r"<[^>]*>|\[[^\]]*\]|.", end)
    marker = first.group() if first else end
    rest = terms.of(end.removeprefix(marker))
    if terms.has_special(marker):
        yield f"reasoning: /(?s:.*)/ {terms.of(marker)} {rest}"
    else:
        yield f"reasoning: reasoning_text {rest}"
        yield f"reasoning_text[suffix={_quoted(marker)}]: /(?s:.*)/"
    yield "space: /[ \\n]{0,2}/"
    if in_reasoning:
        yield "thoughts: reasoning space"
    else:
        yield f"thoughts: ({terms.of(begin)} reasoning space)?"


def _arguments(index: int, field: str, schema: Mapping[str, Any], tool: ToolFormat, terms: _Terms) -> Iterator[str]:
    """Rules for the arguments of a tool, whose schema is in ``field`` of the request."""
    rule = f"arguments_{index}"
    if tool.values == "json":
        yield f"{rule}: {_json(field, schema)}"
        return
    form = ELEMENTS[tool.values]
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if unknown := schema.keys() - OBJECT_KEYS:
        raise _cant_enforce(field, sorted(unknown))
    if missing := set(required) - properties.keys():
        raise _cant_enforce(f"{field}.required", sorted(missing))
    elements = []
    for number, (key, value) in enumerate(properties.items()):
        if not re.fullmatch(form.key, key):
            raise _cant_enforce(f"{field}.properties", [f"the name {key:.80}"])
        element = f"{rule}_{number}"
        expression = _value(f"{field}.properties.{key}", value if isinstance(value, dict) else {}, schema, form)
        if expression:
            yield f"{element}: ({expression}) {terms.of(form.after)}"
        elif terms.has_special(form.after):
            yield f"{element}: /{form.text}/ {terms.of(form.after)}"
        else:  # one expression, because a text would go on with what is after it
            yield f"{element}: /{form.text}{_escaped(form.after)}/"
        written = f"{terms.of(form.before + key + form.between)} {element}"
        elements.append(written if key in required else f"({written})?")
    yield f"{rule}: {' '.join(elements)}" if elements else f'{rule}: ""'


def _value(field: str, schema: dict[str, Any], root: Mapping[str, Any], form: Elements) -> str:
    """The expression for one argument that isn't any text: a choice, or JSON; "" for one that is."""
    if "enum" in schema or "const" in schema:
        if "enum" in schema and (not isinstance(schema["enum"], list) or "const" in schema):
            raise _cant_enforce(field, ["enum"])
        if extra := schema.keys() - NOTES - {"type", "enum", "const"}:
            raise _cant_enforce(field, sorted(extra))
        texts = [plain_text(choice) for choice in choices_of(schema)]
        if wrong := [text for text in texts if not re.fullmatch(form.text, text)]:
            raise _cant_enforce(field, [f"the value {wrong[0]!r:.80}"])
        return " | ".join(map(_quoted, texts)) or '""'
    types = set(schema_types(schema, root))
    constraints = schema.keys() - NOTES - {"type"}
    if types <= {"string"} and not constraints:
        return ""
    if (not types and "$ref" not in schema) or "string" in types:
        raise _cant_enforce(field, sorted(constraints or {"type"}))
    definitions = {place: root[place] for place in ("$defs", "definitions") if place in root}
    return _json(field, {**schema, **definitions})


def _object(schema: str) -> dict[str, Any]:
    """The JSON Schema in a text. RequestError if it is no object."""
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError("The JSON Schema must be a JSON object.", param="response_format")
    return value


def _json(field: str, schema: Mapping[str, Any]) -> str:
    """The expression for a JSON value. RequestError for a schema, in ``field``, that can't be enforced."""
    try:
        checked_schema(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: the JSON Schema can't be enforced: {error}", param=field) from None
    return "%json " + json.dumps({**schema, "x-guidance": STRICT}, ensure_ascii=False)


def _cant_enforce(field: str, keys: Sequence[str]) -> RequestError:
    return RequestError(
        f"{field}: the call format of this model can't enforce {', '.join(keys)}; leave it out, or use tool_choice "
        "auto.",
        param=field,
    )
