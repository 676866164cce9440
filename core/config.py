"""Configuration: settings structs filled from TOML tables and command-line flags.

Flags override the TOML file, which overrides the defaults. Both processes use the same :class:`Config`; it is sent
to the engine as builtin types (:meth:`Config.dump`, :meth:`Config.load`).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from trunkline.core.types import Settings, SettingsGroup

from .errors import ConfigError
from .host import Host
from .settings import EngineSettings, ModelSettings, PluginSelection, ServerSettings

DETERMINISTIC_BACKENDS = ("auto", "cpu")
DEFAULT_MODEL = "demo:smollm2-135m-instruct"


class Config(Struct, frozen=True, kw_only=True):
    """All settings of a server. The first model is the primary one."""

    settings: dict[str, Any]  # name of a group -> its struct
    models: tuple[ModelSettings, ...]
    plugins: PluginSelection = PluginSelection()

    @property
    def server(self) -> ServerSettings:
        group = self.settings["server"]
        assert isinstance(group, ServerSettings)
        return group

    @property
    def engine(self) -> EngineSettings:
        group = self.settings["engine"]
        assert isinstance(group, EngineSettings)
        return group

    def dump(self) -> dict[str, Any]:
        """Builtin types that msgpack can encode; :meth:`load` is the inverse."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain | {"models": [model.table() for model in self.models]}

    def settings_of(self, model_settings: ModelSettings) -> Settings:
        """All settings as they apply to a model."""
        return self.settings | model_settings.plugins

    @classmethod
    def load(cls, data: Mapping[str, Any], host: Host) -> Config:
        """A config from nested builtin types with the keys ``settings`` (tables by group), ``models``, ``plugins``.

        Missing tables and keys get their defaults; without models, the demo model is served. ConfigError names the
        table and the key of an invalid value.
        """
        groups = settings_groups(host)
        tables = data.get("settings", {})
        _check_known("settings table", tables, groups)
        models = data.get("models") or [{"model_path": DEFAULT_MODEL}]
        whole = {name: group.schema for name, group in groups.items() if not group.per_model}
        config = cls(
            settings={name: convert(tables.get(name, {}), schema, name) for name, schema in whole.items()},
            models=tuple(_model(table, tables, groups) for table in models),
            plugins=convert(data.get("plugins", {}), PluginSelection, "plugins"),
        )
        _check_names_differ(config.models)
        return config


MODEL_FIELDS = tuple(name for name in ModelSettings.__struct_fields__ if name != "plugins")
CORE_GROUPS = (SettingsGroup("server", ServerSettings), SettingsGroup("engine", EngineSettings))
_OTHER_TABLES = {"models": ModelSettings, "plugins": PluginSelection}

S = TypeVar("S", bound=Struct)


def settings_groups(host: Host) -> dict[str, SettingsGroup]:
    """Core's groups, then the plugins'. ConfigError when a group or a field's flag is claimed twice."""
    groups = {group.name: group for group in CORE_GROUPS}
    for name, group in host.settings().items():
        if name in groups or name in _OTHER_TABLES:
            raise ConfigError(f"A plugin's settings group is called {name!r}, which is core's own; it must be renamed.")
        groups[name] = group
    owner = dict.fromkeys(MODEL_FIELDS, "models")
    for name, group in groups.items():
        for field in group.schema.__struct_fields__:
            other = owner.setdefault(field, name)
            if other != name:
                raise ConfigError(f"Settings [{name}] and [{other}] both have {field!r}; one has to rename it.")
    return groups


def convert(table: Any, schema: type[S], name: str) -> S:
    """A TOML table or a dict of flag values as its struct. ConfigError names table, key and limit."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[{name}] must be a table, not {table!r}.")
    _check_known(f"[{name}] setting", table, schema.__struct_fields__)
    try:
        return msgspec.convert(dict(table), schema)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        key = re.sub(r"^`?\$\.?|`$", "", where)
        value = table.get(key.split("[")[0])
        given = "" if value is None else f" = {value!r}"
        raise ConfigError(f"[{name}] {key}{given}: {problem.replace('`', '')}".replace("  ", " ")) from None


def _model(table: Any, tables: Mapping[str, Any], groups: Mapping[str, SettingsGroup]) -> ModelSettings:
    """A ``[[models]]`` table. Its keys of plugins' settings override the tables of their groups."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[models] must be a table, not {table!r}.")
    plugins = {name: group.schema for name, group in groups.items() if group.per_model}
    fields = {field: name for name, schema in plugins.items() for field in schema.__struct_fields__}
    _check_known("[models] setting", table, [*MODEL_FIELDS, *fields])
    core: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: dict(tables.get(name, {})) for name in plugins}
    for key, value in table.items():
        (own[fields[key]] if key in fields else core)[key] = value
    converted = {name: convert(own[name], schema, name) for name, schema in plugins.items()}
    model = convert(core, ModelSettings, "models")
    if model.enable_deterministic_inference and model.attention_backend not in DETERMINISTIC_BACKENDS:
        raise ConfigError(
            f"{model.name} can't have both --enable-deterministic-inference and --attention-backend "
            f"{model.attention_backend}: leave one of the two out. Only the backend cpu has a deterministic mode."
        )
    return msgspec.structs.replace(model, plugins=converted)


def read_file(path: Path) -> dict[str, Any]:
    """A TOML file in the form that :meth:`Config.load` takes."""
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"Can't read the configuration file {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't valid TOML: {error}.") from error
    data: dict[str, Any] = {key: tables.pop(key) for key in _OTHER_TABLES if key in tables}
    for name, table in [*tables.items(), ("plugins", data.get("plugins", {}))]:
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name!r} must be a table, not {table!r}; settings stand under [server] etc.")
    models = data.get("models", [])
    if not (isinstance(models, list) and all(isinstance(model, dict) for model in models)):
        raise ConfigError(f"{path}: write [[models]], one table for each model, not [models].")
    return data | {"settings": tables}


def merge(
    data: Mapping[str, Any],
    *,
    settings: Mapping[str, Mapping[str, Any]],
    every_model: Mapping[str, Any],
    models: Iterable[Mapping[str, Any]],
    plugins: Mapping[str, Any],
) -> dict[str, Any]:
    """Override a file's ``data`` by flags.

    ``every_model`` applies to all models. If ``models`` (each with a ``model_path``) isn't empty, exactly these
    models are served; a model that is in the file, too, keeps the file's other keys.
    """
    tables = {name: dict(table) for name, table in data.get("settings", {}).items()}
    for name, flags in settings.items():
        tables[name] = tables.get(name, {}) | dict(flags)
    in_file = [dict(table) for table in data.get("models", [])]
    by_path = {table.get("model_path"): table for table in in_file}
    named = [by_path.get(model["model_path"], {}) | dict(every_model) | dict(model) for model in models]
    served = named or [table | dict(every_model) for table in in_file or [{"model_path": DEFAULT_MODEL}]]
    return {"settings": tables, "models": served, "plugins": dict(data.get("plugins", {})) | dict(plugins)}


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
            raise ConfigError(f"Unknown {what} {name!r}; {hint}")


def _check_names_differ(models: Iterable[ModelSettings]) -> None:
    seen: set[str] = set()
    for model in models:
        for name in {model.name, *model.served_model_aliases}:
            if name in seen:
                raise ConfigError(f"Two models are served as {name!r}; set --served-model-name on one of them.")
            seen.add(name)
