"""``tools`` and ``tool_choice`` of a chat: what the template gets, and which calls are allowed or forced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.errors import RequestError

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
MODES = ("none", "auto", "required")


class FunctionTool(Struct):
    """A function that the model may call. ``parameters`` is a JSON Schema; ``strict`` is enforced for forced calls."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    """A tool of the request: a function."""

    type: str = "function"
    function: FunctionTool | None = None


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
"""``tools`` of a body: at most 128."""


class ToolRequest(Struct, frozen=True):
    """The tools of a request.

    ``shown``: those for the chat template. ``schemas``: the parameters of those that may be called, by name;
    ``fields``: where the request has them.
    ``forced``: the reply must consist of calls of them. ``many``: it may have several.
    """

    shown: list[dict[str, Any]] = []
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    forced: bool = False
    many: bool = True


def read_tools(tools: Sequence[Tool], choice: Any, *, parallel: bool | None) -> ToolRequest:
    """The tools of a body, with its ``tool_choice`` and ``parallel_tool_calls``. RequestError for invalid ones."""
    functions: dict[str, FunctionTool] = {}
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        function, schema = _read_tool(place, tool)
        if function.name in schemas:
            place = f"{place}.function.name"
            raise RequestError(f"{place}: there are two tools named {function.name}.", param=place)
        functions[function.name], schemas[function.name] = function, schema
        fields[function.name] = f"{place}.function.parameters"
    mode, names = _read_choice(choice, schemas)
    if mode == "none":
        return ToolRequest()
    chosen = {name: schemas[name] for name in names}
    shown = [_shown(function) for name, function in functions.items() if name in chosen]
    many = parallel is True if mode == "named" else parallel is not False
    return ToolRequest(shown, chosen, fields, mode in ("required", "named"), many)


def _shown(function: FunctionTool) -> dict[str, Any]:
    """A tool as templates get it: with the fields that the request has."""
    fields = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
        "strict": function.strict,
    }
    return {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}


def _read_tool(place: str, tool: Tool) -> tuple[FunctionTool, dict[str, Any]]:
    if tool.type != "function":
        raise RequestError(
            f"{place}.type must be 'function', got {tool.type!r:.40}: the server runs no tools itself.",
            param=f"{place}.type",
        )
    function, place = tool.function, f"{place}.function"
    if function is None:
        raise RequestError(f"Missing required parameter: '{place}'.", param=place)
    if not NAME.fullmatch(function.name):
        raise RequestError(
            f"{place}.name must have 1 to 64 letters, digits, underscores, dots or dashes; got {function.name!r:.80}.",
            param=f"{place}.name",
        )
    schema = function.parameters or NO_PARAMETERS
    _check_schema(f"{place}.parameters", schema)
    return function, {"type": "object", **schema}


def _check_schema(place: str, schema: Mapping[str, Any]) -> None:
    """RequestError if the schema of a tool isn't one of an object."""
    if schema.get("type", "object") != "object":
        raise RequestError(f"{place}.type must be 'object', got {schema['type']!r:.60}.", param=f"{place}.type")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise RequestError(f"{place}.properties must be an object of schemas.", param=f"{place}.properties")
    for name, value in properties.items():
        if not isinstance(value, dict | bool):
            field = f"{place}.properties.{name:.80}"
            raise RequestError(f"{field} must be a schema: an object, true or false.", param=field)
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RequestError(f"{place}.required must be a list of names.", param=f"{place}.required")


def _read_choice(choice: Any, schemas: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Whether calls are allowed ("auto"), forced ("required", "named") or neither ("none"), and of which tools."""
    place = "tool_choice"
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        if choice not in MODES:
            raise RequestError(
                f"Invalid value: {choice!r:.60}. Supported values are: 'none', 'auto', 'required', or an object that "
                "names a function.",
                param=place,
            )
        if choice == "required" and not schemas:
            raise RequestError("tool_choice needs tools; the request has none.", param=place)
        return (choice if schemas else "none"), [*schemas]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
        listed = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
            raise RequestError(f"{place} of type allowed_tools needs a mode (auto or required) and tools.", param=place)
        return mode, [_named(each, schemas) for each in listed]
    return "named", [_named(choice, schemas)]


def _named(choice: Any, schemas: Mapping[str, Any]) -> str:
    """The name in ``{"type": "function", "function": {"name": …}}``."""
    place = "tool_choice.function.name"
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or an object that names a function.',
            param="tool_choice",
        )
    if name not in schemas:
        raise RequestError(f"{place} {name!r:.80} isn't the name of a tool of the request.", param=place)
    return name
