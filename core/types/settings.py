"""Declares a plugin's settings; the type of all settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class SettingsGroup(Struct, frozen=True):
    """One TOML table and one panel of flags, described by a frozen ``msgspec.Struct``.

    Every field needs a default and ``Annotated[..., Meta(description=...)]``; the flag is the
    field's name with dashes. Start-up fails if two groups have a field of the same name.

    With ``per_model`` the fields can be set for each model: in its ``[[models]]`` table, or by flags after it. The
    values of a model are in the settings that hooks about this model get, and in ``engine.settings(name)``.
    """

    name: str
    schema: type[Struct]
    per_model: bool = False


Settings = Mapping[str, Any]
"""All settings by group name: ``settings["shout"].shout_level``."""
