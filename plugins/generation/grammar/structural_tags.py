"""Converts structural tags (SGLang's legacy form) to llguidance's variant of Lark's syntax.

The output is free text. Where it has a trigger, the beginning of one of the structures with this trigger follows, then
a value for its schema, then its end; after that, free text again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from .json_schema import OPTIONS, checked_schema

MAX_STRUCTURES = 128

NEWER_FORM = (
    "the form with \"format\" is not supported; send {\"type\": \"structural_tag\", \"structures\": "
    "[{\"begin\": …, \"schema\": …, \"end\": …}], \"triggers\": […]}"
)  # fmt: skip


class Structure(Struct, frozen=True):
    """``schema``: a JSON Schema."""

    begin: str
    schema: dict[str, Any] | bool
    end: str


class StructuralTag(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="structural_tag"):
    """What clients send as JSON."""

    structures: list[Structure]
    triggers: list[str]


def lark_of_tags(text: str, is_special: Callable[[str], bool]) -> str:
    """The grammar. ``is_special``: whether a text is one special token. ValueError for a text that can't be used."""
    tag = _decoded(text)
    lines = []
    for index, structure in enumerate(tag.structures):
        trigger = _trigger_of(structure.begin, tag.triggers)
        schema = checked_schema(json.dumps(structure.schema)) | {"x-guidance": OPTIONS}
        if is_special(trigger):  # free text has no special tokens
            lines.append(f"head{index}: TEXT {trigger}")
        else:
            lines.append(f"head{index}[lazy]: TEXT {json.dumps(trigger)}")
        pieces = [structure.begin[len(trigger) :], structure.end]
        before, after = (json.dumps(piece) if piece else "" for piece in pieces)
        lines.append(f"tag{index}: head{index} {before} %json {json.dumps(schema)} {after}")
    tags = " | ".join(f"tag{index}" for index in range(len(tag.structures)))
    return "\n".join([f"start: ({tags})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *lines])


def _decoded(text: str) -> StructuralTag:
    try:
        raw = msgspec.json.decode(text)
        if isinstance(raw, dict) and "format" in raw:
            raise ValueError(NEWER_FORM)
        tag = msgspec.convert(raw, StructuralTag)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not tag.structures:
        raise ValueError("structures must have at least one structure")
    if len(tag.structures) > MAX_STRUCTURES:
        raise ValueError(f"at most {MAX_STRUCTURES} structures are allowed, got {len(tag.structures)}")
    return tag


def _trigger_of(begin: str, triggers: Sequence[str]) -> str:
    """The longest trigger with which a structure begins."""
    found = [trigger for trigger in triggers if trigger and begin.startswith(trigger)]
    if not found:
        raise ValueError(f"begin {begin[:64]!r} starts with none of the triggers")
    return max(found, key=len)
