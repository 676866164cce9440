"""Annotations of body fields that are refused or ignored.

A field without one of them is honoured, that is, the route reads it::

    class Body(Struct):
        text: str
        logprobs: Annotated[Any, Refused()] = None  # a value that requests something is a 400
        user: Annotated[Any, Ignored("it doesn't change the answer")] = None

:func:`read_body` checks refused fields for all routes; ``docs/fields.md`` is made from the same annotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from msgspec import Struct

from trunkline.core.errors import RequestError


@dataclass(frozen=True, eq=False, slots=True)
class Refused:
    """A field that the server knows and doesn't support.

    ``message`` is the error; ``{field}`` in it is replaced by the field's name. Null is accepted, and so are values
    that request nothing: those in ``neutral`` and, with ``empty``, also false, 0, "", an empty object, and arrays that
    contain nothing else (but an empty object in an array counts as a value, for example as a tool).
    """

    message: str = "{field} is not supported yet; leave it out or set it to null."
    neutral: tuple[Any, ...] = ()
    empty: bool = True

    def allows(self, value: Any) -> bool:
        """Whether a value requests nothing and is accepted."""
        if value is None or value in self.neutral:
            return True
        if isinstance(value, list):
            return self.empty and not any(item or isinstance(item, dict) for item in value)
        return self.empty and not value


@dataclass(frozen=True, eq=False, slots=True)
class Ignored:
    """A field that accepts any value and has no effect; ``why`` is for the documentation."""

    why: str


Unsupported = Annotated[Any, Refused()]
"""Type of a field that isn't supported; null and empty values are accepted."""
UnsupportedUnlessNull = Annotated[Any, Refused(empty=False)]
"""Type of a field that isn't supported and for which 0 or {} is a request, too; only null is accepted."""
UnsupportedMedia = Annotated[Any, Refused("{field} is not supported: this server takes text only. Leave it out.")]
"""Type of a field that carries images, video or audio: refused."""
IgnoredMediaOption = Annotated[Any, Ignored("it is about images, video or audio, which are refused")]
"""Type of a field that only says how to treat images, video or audio: ignored."""
IgnoredAccountingField = Annotated[Any, Ignored("the server keeps no record of requests for its clients")]
"""Type of a field for the records of a hosted service: ignored."""
IgnoredPlacementField = Annotated[Any, Ignored("it chooses between replicas, and this server is one")]
"""Type of a field that chooses a replica: ignored."""
IgnoredMessagesOption = Annotated[Any, Ignored("it matters only with messages, which are refused")]
"""Type of a field that only says how to treat messages: ignored."""
IgnoredOverridesOption = Annotated[Any, Ignored("it matters only with embed_overrides, which are refused")]
"""Type of a field that only says how to treat embed_overrides: ignored."""
UnsupportedPadding = Annotated[Any, Refused("{field} is not supported: inputs are never padded.", ("do_not_pad",))]
"""Type of a field that asks for padding: refused."""
UnsupportedTruncateTokens = Annotated[Any, Refused("{field} is not supported; truncate is.", empty=False)]
"""Type of vLLM's truncate_prompt_tokens: refused."""
IgnoredTruncationSide = Annotated[Any, Ignored("it matters only with truncate_prompt_tokens, which is refused")]
"""Type of vLLM's truncation_side: ignored."""


def declared(schema: type[Struct]) -> dict[str, Refused | Ignored]:
    """The fields of a body that aren't honoured."""
    found = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Refused | Ignored):
                found[name] = mark
    return found


def fields_of(schema: type[Struct], path: str = "") -> Iterator[tuple[str, Refused | Ignored | None]]:
    """All fields of a body and of the structs in it, such as ``messages[].role``; None: it is honoured."""
    marks, hints = declared(schema), get_type_hints(schema)
    for name in schema.__struct_fields__:
        yield path + name, marks.get(name)
        if name not in marks:
            for inner, listed in _structs_in(hints[name]):
                yield from fields_of(inner, f"{path}{name}{'[]' if listed else ''}.")


def check_refused(body: Struct, path: str = "") -> None:
    """RequestError for the first refused field with a value that isn't allowed, in ``body`` or the structs in it."""
    refused, nested = _plan(type(body))
    for name, mark in refused:
        if not mark.allows(getattr(body, name)):
            raise RequestError(mark.message.format(field=path + name), param=path + name)
    for name in nested:
        for label, value in _structs(name, getattr(body, name)):
            check_refused(value, f"{path}{label}.")


@lru_cache(maxsize=256)  # more than there are routes
def _plan(schema: type[Struct]) -> tuple[list[tuple[str, Refused]], list[str]]:
    """Refused fields, and the honoured ones whose value may be or hold a struct."""
    marks, hints = declared(schema), get_type_hints(schema)
    refused = [(name, mark) for name, mark in marks.items() if isinstance(mark, Refused)]
    return refused, [name for name, hint in hints.items() if name not in marks and any(_structs_in(hint))]


def _structs_in(hint: Any, listed: bool = False) -> Iterator[tuple[type[Struct], bool]]:
    """The structs of a type, each with whether it is the element of a list."""
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint, listed
    for part in get_args(hint):
        yield from _structs_in(part, listed or get_origin(hint) is list)


def _structs(name: str, value: Any) -> Iterator[tuple[str, Struct]]:
    if isinstance(value, Struct):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}[{index}]", one) for index, one in enumerate(value) if isinstance(one, Struct))
