"""Finds installed plugins by entry point, selects some, imports and checks each."""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Generic, TypeVar

import msgspec

from trunkline.core.types import SettingsGroup, Stage

from .errors import ConfigError, PluginError, describe_error
from .hookspecs import PROJECT

CORE = "models"  # core's own plugin, always loaded
T = TypeVar("T")


@dataclass(slots=True)
class Plugin:
    """An installed plugin: its entry point and, once it is loaded, its module and the hooks that it implements."""

    name: str
    target: str  # the entry point's value, "package.module"
    distribution: str = ""
    version: str = ""
    module: ModuleType | None = None
    hooks: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip() or self.target

    @property
    def label(self) -> str:
        """Name and origin, for messages."""
        return f"plugin {self.name!r} ({self.origin})"


@dataclass(frozen=True, slots=True)
class Provided(Generic[T]):
    """An object that is used while requests are served, and the plugin that provided it."""

    plugin: Plugin
    value: T

    def failed(self, message: str) -> PluginError:
        """The error for a failure of the object; it names plugin and distribution."""
        return PluginError(self.plugin.name, message, self.plugin.origin)


def find() -> list[Plugin]:
    """All installed plugins by name. PluginError when two distributions use one name."""
    found: dict[str, Plugin] = {}
    for entry in importlib.metadata.entry_points(group=PROJECT):
        distribution = entry.dist
        plugin = Plugin(
            entry.name,
            entry.value,
            distribution.name if distribution else "",
            distribution.version if distribution else "",
        )
        other = found.setdefault(entry.name, plugin)
        if other.target != plugin.target:
            raise PluginError(
                entry.name, f"installed by both {other.origin} and {plugin.origin}; uninstall one of them"
            )
    return sorted(found.values(), key=lambda plugin: plugin.name)


def select(plugins: Iterable[Plugin], only: Collection[str] | None, without: Collection[str]) -> list[Plugin]:
    """The plugins to load. ConfigError for names that aren't installed, and when core's own is left out."""
    by_name = {plugin.name: plugin for plugin in plugins}
    for name in [*(only or ()), *without]:
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"installed are: {', '.join(by_name)}."
            raise ConfigError(f"There is no plugin {name!r}; {hint}")
    if CORE in without:
        raise ConfigError(f"The plugin {CORE!r} is core's own and can't be left out.")
    return [
        plugin
        for name, plugin in by_name.items()
        if name not in without and (only is None or name in only or name == CORE)
    ]


def load_module(plugin: Plugin) -> None:
    """Import the plugin's module, unless it has one. PluginError when that fails."""
    if plugin.module is not None:
        return
    try:
        plugin.module = importlib.import_module(plugin.target)
    except (Exception, SystemExit, GeneratorExit) as error:  # a module may raise anything when it is imported
        raise PluginError(plugin.name, f"can't be imported ({plugin.origin}): {describe_error(error)}") from error


def check_functions(plugin: Plugin, known: Collection[str]) -> list[str]:
    """The hooks that a module implements, sorted. PluginError for a function that would never be called."""
    hooks = []
    for attribute, function in vars(plugin.module).items():
        options = getattr(function, f"{PROJECT}_impl", None) if inspect.isroutine(function) else None
        if options is None:
            if attribute.startswith(f"{PROJECT}_") and inspect.isroutine(function):
                raise PluginError(plugin.name, f"{attribute} isn't marked with @hookimpl: it would never be called")
            continue
        name = options["specname"] or attribute
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PluginError(plugin.name, f"there is no hook {name}{hint}")
        if options["wrapper"] or options["hookwrapper"]:
            raise PluginError(plugin.name, f"{name} is a wrapper, but each plugin is asked alone: nothing to wrap")
        hooks.append(name)
    return sorted(hooks)


def check_stage(plugin: str, stage: Stage) -> None:
    """PluginError for a class attribute of a stage that is missing or wrong."""
    name = type(stage).__name__
    if not isinstance(getattr(stage, "task", None), str):
        raise PluginError(plugin, f"{name}.task must be the task's name")
    for attribute in ("params", "result"):
        schema = getattr(stage, attribute, None)
        if not (isinstance(schema, type) and issubclass(schema, msgspec.Struct)):
            raise PluginError(plugin, f"{name}.{attribute} must be a msgspec.Struct class, not {schema!r}")


def check_settings(plugin: str, group: SettingsGroup) -> None:
    """PluginError for a field without default: a server must start without a configuration."""
    if not group.schema.__struct_config__.frozen:
        raise PluginError(plugin, f"settings struct {group.schema.__name__} must be frozen")
    for setting in msgspec.structs.fields(group.schema):
        if setting.required:
            raise PluginError(plugin, f"setting {setting.name!r} has no default")
