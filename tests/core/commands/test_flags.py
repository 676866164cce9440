from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from trunkline.core.commands.flags import Flag, flags_of, signature
from trunkline.core.types import SettingsGroup


class Example(Struct, frozen=True):
    count: Annotated[int, Meta(ge=1, description="How many.", extra={"aliases": ("--number",)})] = 3
    share: Annotated[Annotated[float, Meta(gt=0)] | None, Meta(description="A part.")] = None
    quiet: Annotated[bool, Meta(description="Say less.")] = False
    checks: Annotated[bool, Meta(description="Look twice.")] = True
    colour: Literal["red", "green"] = "red"
    names: tuple[str, ...] = ()
    more: list[str] | None = None
    table: Annotated[dict[str, int], Meta(description="TOML only.")] = {}
    either: int | str = 1


@pytest.fixture
def flags() -> dict[str, Flag]:
    return {flag.field: flag for flag in flags_of(SettingsGroup("example", Example), "Example")}


def test_kinds_and_names(flags: dict[str, Flag]) -> None:
    assert flags["count"].names == ("--count", "--number")
    assert {name: (flag.kind, flag.many) for name, flag in flags.items()} == {
        "count": (int, False),
        "share": (float, False),
        "quiet": (bool, False),
        "checks": (bool, False),
        "colour": (Literal["green", "red"], False),
        "names": (str, True),
        "more": (str, True),
    }


def test_fields_that_no_flag_can_carry_are_for_toml(flags: dict[str, Flag]) -> None:
    assert not {"table", "either"} & set(flags)


def test_help_names_the_default_unless_it_is_nothing(flags: dict[str, Flag]) -> None:
    shown = {name: flag.default for name, flag in flags.items() if flag.default is not None}
    assert shown == {"count": "3", "checks": "on", "colour": "red"}
    assert flags["share"].help == "A part."


def option(flag: Flag) -> Any:
    """Typer's OptionInfo; the first name stands in ``default``."""
    return flag.parameter.annotation.__metadata__[0]


def test_only_a_switch_that_is_on_has_a_flag_to_turn_it_off(flags: dict[str, Flag]) -> None:
    assert option(flags["quiet"]).default == "--quiet"
    assert option(flags["checks"]).default == "--checks/--no-checks"


def test_brackets_in_help_survive_rich_markup() -> None:
    assert option(Flag("g", "f", ("--f",), str, "In [server].")).help == r"In \[server]."


def test_lists_are_comma_separated_and_repeatable(flags: dict[str, Flag]) -> None:
    assert flags["names"].value(["a, b", "c", ""]) == ("a", "b", "c")
    assert flags["count"].value(4) == 4


def test_every_flags_value_converts_back_to_its_field(flags: dict[str, Flag]) -> None:
    given = {"count": 4, "share": 0.5, "quiet": True, "checks": False, "colour": "green", "names": ["a,b"]}
    values = {name: flags[name].value(value) for name, value in given.items()}
    assert msgspec.convert(values, Example) == Example(4, 0.5, True, False, "green", ("a", "b"))


def test_signature(flags: dict[str, Flag]) -> None:
    described, annotations = signature(flag.parameter for flag in flags.values())
    assert list(described.parameters) == list(flags) == list(annotations)
    assert all(parameter.default is None for parameter in described.parameters.values())
