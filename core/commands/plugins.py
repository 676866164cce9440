"""``trunkline plugins list`` and ``trunkline plugins inspect NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trunkline.core.config import Config
from trunkline.core.discovery import Plugin, find
from trunkline.core.errors import ConfigError, PluginError
from trunkline.core.host import Host

from .flags import flags_of


def add_plugins(app: typer.Typer, host: Host) -> None:
    """Add the command group ``plugins``."""
    group = typer.Typer(help="Show installed plugins.", no_args_is_help=True)

    @group.command("list", help="All installed plugins, with distribution, version and hooks.")
    def list_plugins() -> None:
        show_list(host, Console())

    @group.command("inspect", help="What one plugin contributes: hooks, settings, routes with their scopes, controls.")
    def inspect_plugin(name: str) -> None:
        show_plugin(host, name, Console())

    app.add_typer(group, name="plugins")


def show_list(host: Host, console: Console) -> None:
    """One line per plugin; quarantined ones with their error."""
    table = Table("plugin", "distribution", "version", "hooks", box=None, pad_edge=False)
    for plugin in sorted(host.plugins.values(), key=lambda plugin: plugin.name):
        hooks = ", ".join(short(hook) for hook in plugin.hooks)
        table.add_row(plugin.name, plugin.distribution, plugin.version, hooks)
    for plugin, error in host.quarantined.values():
        table.add_row(plugin.name, plugin.distribution, plugin.version, f"[red]left out:[/] {escape(str(error))}")
    console.print(table)


def show_plugin(host: Host, name: str, console: Console) -> None:
    """What one plugin contributes. ConfigError when it isn't installed; its PluginError when it is quarantined."""
    if name in host.quarantined:
        raise host.quarantined[name][1]
    if name not in host.plugins:
        raise ConfigError(f"There is no plugin {name!r}; installed are: {', '.join(p.name for p in find())}.")
    plugin = host.plugins[name]
    console.print(f"[bold]{name}[/]  {escape(plugin.origin)}  ({escape(plugin.target)})")
    if plugin.module is not None and plugin.module.__doc__:
        console.print(escape(inspect.cleandoc(plugin.module.__doc__).splitlines()[0]))
    _section(console, "hooks", ("hook", "what it is for"), hook_rows(host, plugin))
    _section(console, "settings", ("flag", "default", "about"), setting_rows(host, name))
    _section(console, "controls", ("name",), ((key,) for key in control_names(host, name)))
    if "trunkline_routes" in plugin.hooks:
        _section(console, "routes", ("methods", "path", "scope"), route_rows(host, name))


def short(hook: str) -> str:
    return hook.removeprefix("trunkline_")


def hook_rows(host: Host, plugin: Plugin) -> Iterable[tuple[str, str]]:
    """Each hook with the first sentence of its specification."""
    for hook in plugin.hooks:
        about = inspect.cleandoc(host.specification(hook).__doc__ or "")
        yield short(hook), " ".join(about.split("\n\n")[0].split()).removesuffix("::")


def setting_rows(host: Host, name: str) -> Iterable[tuple[str, str, str]]:
    for plugin, group in host.ask("trunkline_settings", of=[name]):
        for flag in flags_of(group, plugin):
            yield " ".join(flag.names), flag.default or "", flag.help


def control_names(host: Host, name: str) -> list[str]:
    return sorted(key for _, mapping in host.ask("trunkline_controls", of=[name]) for key in mapping)


def route_rows(host: Host, name: str) -> Iterable[tuple[str, str, str]]:
    """Methods, path and scope of the plugin's handlers, which are made but not called."""
    settings = Config.load({}, host).settings
    try:
        handlers = host.routes(NoEngine(), settings, of=[name])
    except PluginError as error:
        if isinstance(error.__cause__, NeedsEngine):
            yield "", "known only while a server runs", ""
            return
        raise
    for _, handler in handlers:
        methods = " ".join(sorted(getattr(handler, "http_methods", ("WS",))))
        for path in sorted(handler.paths):
            yield methods, path, str(handler.opt.get("scope", ""))


class NeedsEngine(Exception):
    """A plugin used the engine while it made its routes."""


class NoEngine:
    """Used in place of the engine client when no engine runs: routes may keep it; any access raises NeedsEngine."""

    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsEngine(name)


def _section(console: Console, title: str, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    listed = list(rows)
    if not listed:
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for row in listed:
        table.add_row(*(escape(cell) for cell in row))
    console.print(f"\n[bold]{title}[/]")
    console.print(table)
