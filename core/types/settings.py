"""Settings as plugins declare and receive them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class SettingsGroup(Struct, frozen=True):
    """One TOML table and one panel of flags, described by a frozen ``msgspec.Struct``.

    Every field needs a default and ``Annotated[..., Meta(description=...)]``; the flag is the
    field's name with dashes. A field name claimed by two groups stops start-up.
    """

    name: str
    schema: type[Struct]


Settings = Mapping[str, Any]
"""All settings by group name: ``settings["shout"].shout_level``."""
