"""Makes command-line flags from settings structs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import typer
from msgspec import inspect as schema_types

from trunkline.core.types import SettingsGroup


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of a command. ``group`` is the settings table that its value goes to."""

    group: str
    field: str  # the struct's field, and the parameter of the command
    names: tuple[str, ...]
    kind: type | Any  # bool, int, float, str or a Literal
    help: str = ""
    many: bool = False  # comma-separated, and may be repeated
    default: str | None = None  # as shown in the help; None = not shown
    panel: str | None = None  # heading in the help
    hidden: bool = False
    per_model: bool = False  # after a model, it applies to that model

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter from which Typer makes the option. Its default is None, which means "not given"."""
        about = self.help if self.default is None else f"{self.help} Default {self.default}."
        option = typer.Option(
            *(name + self._negation(name) for name in self.names),
            help=about.replace("[", r"\["),  # Typer reads rich markup
            show_default=False,
            rich_help_panel=self.panel,
            hidden=self.hidden,
        )
        annotation = Annotated[(list[str] if self.many else self.kind) | None, option]  # type: ignore[valid-type]
        return inspect.Parameter(self.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def _negation(self, name: str) -> str:
        """``/--no-NAME`` for a switch that is on by default, else ""."""
        return f"/--no-{name[2:]}" if self.kind is bool and self.default == "on" else ""

    def value(self, given: Any) -> Any:
        """The setting's value from the parsed one."""
        if not self.many:
            return given
        return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def flags_of(group: SettingsGroup, panel: str) -> list[Flag]:
    """The flags of a settings group. Fields whose type no flag can express (tables) can be set in TOML only."""
    described = schema_types.type_info(group.schema)
    assert isinstance(described, schema_types.StructType)
    flags = []
    for field in described.fields:
        about, aliases, base = _unwrap(field.type)
        many = isinstance(base, schema_types.VarTupleType | schema_types.ListType)
        kind = str if many else _kind(base)
        if kind is not None:
            names = (f"--{field.name.replace('_', '-')}", *aliases)
            shown = _shown(field.default)
            flags.append(
                Flag(group.name, field.name, names, kind, about, many, shown, panel, per_model=group.per_model)
            )
    return flags


def signature(parameters: Iterable[inspect.Parameter]) -> tuple[inspect.Signature, dict[str, Any]]:
    """``__signature__`` and ``__annotations__`` that give a function these parameters for Typer."""
    listed = list(parameters)
    return inspect.Signature(listed), {parameter.name: parameter.annotation for parameter in listed}


def _unwrap(described: schema_types.Type) -> tuple[str, tuple[str, ...], schema_types.Type]:
    """Description, aliases, and the type without annotations and without ``| None``."""
    about: str = ""
    aliases: tuple[str, ...] = ()
    while isinstance(described, schema_types.Metadata | schema_types.UnionType):
        if isinstance(described, schema_types.Metadata):
            about = (described.extra_json_schema or {}).get("description", about)
            aliases = (described.extra or {}).get("aliases", aliases)
            described = described.type
        else:
            left = [one for one in described.types if not isinstance(one, schema_types.NoneType)]
            if len(left) != 1:
                break
            described = left[0]
    return about, aliases, described


def _kind(base: schema_types.Type) -> Any:
    plain = {
        schema_types.BoolType: bool,
        schema_types.IntType: int,
        schema_types.FloatType: float,
        schema_types.StrType: str,
    }
    if isinstance(base, schema_types.LiteralType) and all(isinstance(value, str) for value in base.values):
        return Literal[tuple(base.values)]
    return plain.get(type(base))


def _shown(default: Any) -> str | None:
    if default is True:
        return "on"
    if default in (None, False, (), msgspec.NODEFAULT):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)
