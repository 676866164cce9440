"""The message that is printed when the server is ready."""

from __future__ import annotations

import sys
from typing import Any

from litestar import Litestar
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from trunkline.core.client.client import Client
from trunkline.core.config import Config
from trunkline.core.host import Host
from trunkline.core.logs import escape_controls
from trunkline.core.types import ServedModel

WIDTH = 100  # columns, if the output is not a terminal


def show(host: Host, config: Config, engine: Client[Any], app: Litestar, address: tuple[Any, ...]) -> None:
    """Print a panel: address, models and their tasks, memory plan, routes, plugins."""
    ready = engine.transport.ready
    assert ready is not None
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("Address", f"http://{name}:{address[1]}   docs at /docs")
    for model in ready.models:
        table.add_row("Model", escape_controls(model_line(model)))
    for row in ready.plan:
        table.add_row("Memory", escape_controls(memory_line(row)))
    table.add_row("Routes", "  ".join(paths(app)))
    table.add_row("Plugins", ", ".join(host.plugins))
    if host.quarantined:
        table.add_row("Left out", ", ".join(host.quarantined))
    table.add_row("Started in", ", ".join(f"{phase} {took:.1f} s" for phase, took in ready.seconds.items()))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    console.print(Panel(table, title="trunkline", title_align="left"), markup=False)


def model_line(model: ServedModel) -> str:
    """One line about a model."""
    return (
        f"{model.name}: {', '.join(model.tasks)} ({model.info.architecture}, {model.dtype}, "
        f"{model.attention_backend} attention, context {model.info.context_length})"
    )


def memory_line(row: dict[str, Any]) -> str:
    """One model's row of the memory plan."""
    weights = f"{row['model']}: weights {size(row['weight_bytes'])}"
    if not row["kv_bytes"]:
        return f"{weights}, no KV pool, up to {row['tokens']} tokens per pass"
    return f"{weights}, KV pool {size(row['kv_bytes'])} for {row['tokens']} tokens"


def paths(app: Litestar) -> list[str]:
    """The paths of all routes but those of the documentation."""
    own = {route.path for route in app.routes if not route.path.startswith(("/docs", "/openapi"))}
    return sorted(own - {"/"})


def size(count: int) -> str:
    """Bytes in readable form: 1536 -> ``1.5 KiB``."""
    number, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        del units[0]
    return f"{number:.4g} {units[0]}"
