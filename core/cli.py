"""The ``trunkline`` command. One file a command in ``commands/``; plugins add theirs by hook."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from trunkline.core.commands.plugins import add_plugins
from trunkline.core.commands.serve import Early, add_serve, peek

from .errors import ConfigError, TrunklineError
from .host import Host
from .logs import escape_controls


def build(host: Host, early: Early) -> typer.Typer:
    """The application with core's commands and those of ``host``'s plugins."""
    app = typer.Typer(
        name="trunkline",
        help="One inference server for every text task on a model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(lambda: None)  # a lone command stays a subcommand
    add_serve(app, host, early)
    add_plugins(app, host)
    host.commands(app)
    return app


def run(args: Sequence[str]) -> int:
    """Run the command line ``args``; the exit status is 2 for what the user can mend, else 1."""
    try:
        early = peek(args[1:]) if args[:1] == ["serve"] else Early()
        app = build(Host.load(early.plugins.only, early.plugins.without), early)
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
