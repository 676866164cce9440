"""Fields of request bodies that change nothing, declared where the body is.

A field is honoured, which means that the route reads it, unless its type says otherwise::

    class Body(Struct):
        text: str
        logprobs: Annotated[Any, Refused()] = None  # any value that asks for something is a 400
        user: Annotated[Any, Ignored("it doesn't change the answer")] = None

:func:`read_body` refuses, so no route has to; ``docs/fields.md`` is made from the same declarations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from msgspec import Struct

from ..errors import RequestError


@dataclass(frozen=True, eq=False, slots=True)
class Refused:
    """A field that the server knows and doesn't serve.

    ``message`` is the error; ``{field}`` in it becomes the field's name. Null passes, and so do values
    that ask for nothing: ``neutral`` ones, and with ``empty`` also false, 0, "", empty arrays and objects
    and arrays of them.
    """

    message: str = "{field} is not supported yet; leave it out or set it to null."
    neutral: tuple[Any, ...] = ()
    empty: bool = True

    def allows(self, value: Any) -> bool:
        if value is None or value in self.neutral:
            return True
        return self.empty and not (any(value) if isinstance(value, list) else value)


@dataclass(frozen=True, eq=False, slots=True)
class Ignored:
    """A field that may have any value and has no effect; ``why`` is for the documentation."""

    why: str


def declared(schema: type[Struct]) -> dict[str, Refused | Ignored]:
    """The fields of a body that aren't honoured."""
    found = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Refused | Ignored):
                found[name] = mark
    return found


def check_refused(body: Struct, path: str = "") -> None:
    """RequestError for the first refused field that asks for something, in ``body`` or the structs in it."""
    refused, nested = _plan(type(body))
    for name, mark in refused:
        if not mark.allows(getattr(body, name)):
            raise RequestError(mark.message.format(field=path + name), param=path + name)
    for name in nested:
        for label, value in _structs(name, getattr(body, name)):
            check_refused(value, f"{path}{label}.")


@lru_cache(maxsize=256)  # more bodies than there are routes
def _plan(schema: type[Struct]) -> tuple[tuple[tuple[str, Refused], ...], tuple[str, ...]]:
    """Refused fields, and the fields whose value may be or hold a struct."""
    marks = declared(schema)
    hints = get_type_hints(schema)
    refused = tuple((name, mark) for name, mark in marks.items() if isinstance(mark, Refused))
    return refused, tuple(name for name in schema.__struct_fields__ if name not in marks and _holds_struct(hints[name]))


def _holds_struct(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, Struct):
        return True
    return any(_holds_struct(part) for part in get_args(hint))


def _structs(name: str, value: Any) -> Iterator[tuple[str, Struct]]:
    if isinstance(value, Struct):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}[{index}]", one) for index, one in enumerate(value) if isinstance(one, Struct))
