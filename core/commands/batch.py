"""``trunkline batch``: answers a file of requests without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from trunkline.core.errors import ConfigError
from trunkline.core.host import Host

from .flags import Flag
from .serve import (
    SEGMENTS,
    ServeCommand,
    StartupSelection,
    add_models_command,
    all_flags,
    configure,
    valued_options,
)

OUTPUT = Flag("", "output", ("--output", "-o"), str, "File of answers; an earlier run that stopped is continued.")
CONCURRENCY = Flag(
    "", "concurrency", ("--concurrency",), int, "Requests that run at a time; default twice --max-running-requests."
)
REQUESTS = "trunkline.requests"  # key in Context.meta of the file of requests
MAX_CONCURRENCY = 1 << 16
UNLIMITED = 1 << 30
# Limits that protect a server from its clients, and lines about each request, don't help here.
DEFAULTS = {
    "log_level": "warning",
    "max_queued_requests": UNLIMITED,
    "max_queued_requests_all_models": UNLIMITED,
    "max_queued_tokens": UNLIMITED,
}


class BatchCommand(ServeCommand):
    """Takes models with their flags, as ``serve``, and the file of requests as the last argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest, ctx.meta[REQUESTS] = split_last(args, valued_options(self))
        return super().parse_args(ctx, rest)


def split_last(args: Sequence[str], valued: set[str]) -> tuple[list[str], str | None]:
    """The last argument that is neither an option nor an option's value, if there is one, and the others.

    ``valued``: the options whose next argument is their value.
    """
    positions, index = [], 0
    while index < len(args):
        name, equals, _ = args[index].partition("=")
        if not name.startswith("-"):
            positions.append(index)
        index += 2 if name in valued and not equals else 1
    if not positions:
        return list(args), None
    last = positions[-1]
    return [*args[:last], *args[last + 1 :]], args[last]


def add_batch(app: typer.Typer, host: Host, selection: StartupSelection) -> None:
    """Add the command ``batch``, which takes the flags of ``serve`` and two of its own."""
    flags = [*all_flags(host), OUTPUT, CONCURRENCY]

    def batch(ctx: typer.Context, **_: Any) -> None:
        segments: Sequence[Mapping[str, Any]] = ctx.meta[SEGMENTS]
        given = {name: value for segment in segments for name, value in segment.items()}
        requests, output, concurrency = ctx.meta[REQUESTS], given.get("output"), given.get("concurrency")
        if requests is None or output is None:
            raise ConfigError(
                "Give a file of requests and one for answers: trunkline batch MODEL IN.jsonl -o OUT.jsonl"
            )
        if concurrency is not None and not 1 <= concurrency <= MAX_CONCURRENCY:
            raise ConfigError(f"--concurrency must be from 1 to {MAX_CONCURRENCY}, got {concurrency}.")
        config = configure(segments, flags, with_defaults(selection), host)
        from trunkline.core.batch_file.main import run_batch

        raise typer.Exit(run_batch(host, config, Path(requests), Path(output), concurrency))

    about = (
        "Answer the requests of a file (OpenAI's batch format), the last argument, without a server. The exit status "
        "is 1 if an answer is an error."
    )
    add_models_command(app, batch, flags, about, BatchCommand)


def with_defaults(selection: StartupSelection) -> StartupSelection:
    """The selection with this command's defaults for settings that its file doesn't have."""
    tables = selection.data.get("settings", {})
    server = DEFAULTS | tables.get("server", {})
    return StartupSelection(selection.data | {"settings": tables | {"server": server}}, selection.plugins)
