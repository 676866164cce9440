"""``trunkline serve``: makes a Config from flags and TOML file, then runs the server."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperCommand

from trunkline.core.config import Config, convert, merge, read_file, settings_groups
from trunkline.core.discovery import CORE
from trunkline.core.errors import ConfigError
from trunkline.core.host import Host
from trunkline.core.logs import configure_logging
from trunkline.core.settings import ModelSettings, PluginSelection
from trunkline.core.types import SettingsGroup

from . import compat
from .flags import Flag, flags_of, signature

MODEL_FLAGS = ("--model-path", "--model")
PER_MODEL = " (after a model: for that model; before the first: for all)"
SEGMENTS = "trunkline.segments"  # key in Context.meta of the parsed segments
SELECTION = (
    Flag("plugins", "plugin", ("--plugin",), str, "Load only this plugin and core's own; repeatable.", True),
    Flag("plugins", "no_plugin", ("--no-plugin",), str, "Leave this plugin out; repeatable.", True),
)
FILE = Flag(
    "", "config", ("--config",), str, "TOML file with tables [server], [engine], [[models]] and those of plugins."
)


@dataclass(slots=True)
class StartupSelection:
    """The configuration file and the selection of plugins, which must be read before the plugins' flags are known."""

    data: dict[str, Any] = field(default_factory=dict)  # of the file, for Config.load
    plugins: PluginSelection = field(default_factory=PluginSelection)


def read_selection(args: Sequence[str]) -> StartupSelection:
    """Read ``--config``, ``--plugin`` and ``--no-plugin`` from the arguments of ``serve``."""
    found: dict[str, list[str]] = {"--config": [], "--plugin": [], "--no-plugin": []}
    for position, token in enumerate(args):
        name, equals, value = token.partition("=")
        if name in found and (equals or position + 1 < len(args)):
            found[name].append(value if equals else args[position + 1])
    data = read_file(Path(found["--config"][-1])) if found["--config"] else {}
    in_file = convert(data.get("plugins", {}), PluginSelection, "plugins")
    only, without = SELECTION[0].value(found["--plugin"]), SELECTION[1].value(found["--no-plugin"])
    return StartupSelection(data, PluginSelection(only=only or in_file.only, without=without or in_file.without))


class ServeCommand(TyperCommand):
    """A command whose arguments are divided into segments: common flags, then each model with its flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse each segment in a separate context."""
        parsed = []
        for segment in split(args, valued_options(self)):
            own = type(ctx)(self, info_name=ctx.info_name, parent=ctx.parent)
            super().parse_args(own, segment)
            parsed.append({name: value for name, value in own.params.items() if value not in (None, (), [])})
        ctx.meta[SEGMENTS] = parsed
        ctx.params = {}
        return []


def valued_options(command: TyperCommand) -> set[str]:
    """The options of a command whose next argument is their value."""
    return {name for param in command.params if not getattr(param, "is_flag", False) for name in param.opts}


def split(args: Sequence[str], valued: set[str]) -> list[list[str]]:
    """Split arguments before each model. ``valued``: the options whose next argument is their value.

    A positional model is rewritten to ``--model-path MODEL``. The first segment has no model.
    """
    segments: list[list[str]] = [[]]
    rest = iter(args)
    for token in rest:
        name, equals, _ = token.partition("=")
        if not token.startswith("-"):
            segments.append([MODEL_FLAGS[0], token])
            continue
        if name in MODEL_FLAGS:
            segments.append([])
        segments[-1].append(token)
        if name in valued and not equals:
            segments[-1].extend(value for value in [next(rest, None)] if value is not None)
    return segments


def all_flags(host: Host) -> list[Flag]:
    """Every flag of ``serve``: models first, then core's groups, then the plugins'."""
    flags = flags_of(SettingsGroup(CORE, ModelSettings, per_model=True), f"Model{PER_MODEL}")
    for name, group in settings_groups(host).items():
        flags += flags_of(group, name.replace("_", " ").capitalize() + (PER_MODEL if group.per_model else ""))
    flags += [*SELECTION, FILE, *compat.flags()]
    seen: dict[str, Flag] = {}
    for flag in flags:
        for name in flag.names:
            other = seen.setdefault(name, flag)
            if other is not flag:
                raise ConfigError(
                    f"The setting {flag.field!r} of [{flag.group}] can't have the flag {name}: it is taken."
                )
    return flags


def add_serve(app: typer.Typer, host: Host, selection: StartupSelection) -> None:
    """Add the command ``serve``, with flags for the settings of core and of ``host``'s plugins."""
    flags = all_flags(host)

    def serve(ctx: typer.Context, **_: Any) -> None:
        config = configure(ctx.meta[SEGMENTS], flags, selection, host)
        if any(own.replicas for own in config.models):
            from trunkline.core.cluster.serve import serve as run
        else:
            from trunkline.core.server.front import serve as run
        run(host, config)

    add_models_command(app, serve, flags, "Serve one or more models over HTTP.")


def add_models_command(
    app: typer.Typer,
    command: Callable[..., None],
    flags: Sequence[Flag],
    about: str,
    kind: type[ServeCommand] = ServeCommand,
) -> None:
    """Add a command whose arguments are models, and ``flags`` before and after each of them.

    It is called with the context, whose ``meta`` has the segments that :class:`ServeCommand` makes of them.
    """
    models = inspect.Parameter(
        "models",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None, typer.Argument(metavar="MODEL", help=f"{flags[0].help} Default: the demo model.")
        ],
    )
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    described, annotations = signature([context, models, *(flag.parameter for flag in flags)])
    command.__signature__ = described  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    app.command(cls=kind, help=about)(command)


def configure(
    segments: Sequence[Mapping[str, Any]], flags: Sequence[Flag], selection: StartupSelection, host: Host
) -> Config:
    """The configuration: the file's, overridden by the parsed ``segments``. ConfigError for invalid settings."""
    by_field = {flag.field: flag for flag in flags}
    settings: dict[str, dict[str, Any]] = {}
    scopes: list[dict[str, Any]] = []
    foreign: dict[str, Any] = {}
    for segment in segments:
        own: dict[str, Any] = {}
        for name, given in segment.items():
            flag = by_field[name]
            if flag.per_model:
                own[name] = flag.value(given)
            elif flag.group == compat.GROUP:
                foreign[name] = given
            elif flag.group not in ("", "plugins"):
                settings.setdefault(flag.group, {})[name] = flag.value(given)
        scopes.append(own)
    common, *models = scopes
    plugins = msgspec.structs.asdict(selection.plugins)
    config = Config.load(
        merge(selection.data, settings=settings, every_model=common, models=models, plugins=plugins), host
    )
    if "served_model_name" in common and len(config.models) > 1:
        raise ConfigError("--served-model-name before the first model would name them all; put it after a model.")
    configure_logging(config.server.log_level)
    compat.check_foreign_flags(foreign)
    return config
