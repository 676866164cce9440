"""Settings as plugins declare and receive them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class SettingsGroup(Struct, frozen=True):
    """One TOML table and one panel of flags, described by a frozen ``msgspec.Struct``.

    Every field needs a default and ``Annotated[..., Meta(description=...)]``; the flag is the
    field's name with dashes. A field name claimed by two groups stops start-up.

    With ``per_model`` every model has the group for itself: its fields may stand in a ``[[models]]`` table, and
    flags after a model are for that one. It is then in the settings that hooks about a model get, and in
    ``engine.settings(name)``.
    """

    name: str
    schema: type[Struct]
    per_model: bool = False


Settings = Mapping[str, Any]
"""All settings by group name: ``settings["shout"].shout_level``."""
