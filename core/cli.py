"""The ``trunkline`` command. Each subcommand has a file in ``commands/``; plugins add others by hook."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from trunkline.core.commands.batch import add_batch
from trunkline.core.commands.plan import add_plan
from trunkline.core.commands.plugins import add_plugins
from trunkline.core.commands.serve import StartupSelection, add_serve, read_selection

from .errors import ConfigError, TrunklineError
from .host import Host
from .logs import escape_controls


def build(host: Host, selection: StartupSelection) -> typer.Typer:
    """The application with core's commands and those of ``host``'s plugins."""
    app = typer.Typer(
        name="trunkline",
        help="One inference server for every text task on a model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(lambda: None)  # without it, Typer would turn a single command into the application itself
    add_serve(app, host, selection)
    add_plan(app, host, selection)
    add_batch(app, host, selection)
    add_plugins(app, host)
    host.commands(app)
    return app


def run(args: Sequence[str]) -> int:
    """Run the command line ``args``. The exit status of an error is 2 if it is in the configuration, else 1."""
    try:
        selection = read_selection(args[1:]) if args[:1] in (["serve"], ["plan"], ["batch"]) else StartupSelection()
        app = build(Host.load(selection.plugins.only, selection.plugins.without), selection)
        app(list(args), prog_name="trunkline")
    except TrunklineError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def main() -> None:
    """Entry point of the ``trunkline`` script."""
    sys.exit(run(sys.argv[1:]))
