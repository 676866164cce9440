"""``trunkline experts``: the expert distribution of a running server, as a table in the terminal."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

SHADES = " ░▒▓█"
COLUMNS = 64  # limit on the characters of a heat line; with more experts, neighbours share a character


def experts(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:30000",
    model: Annotated[str | None, typer.Option(help="Served model name; default the server's first.")] = None,
    top: Annotated[int, typer.Option(min=0, max=5, help="Busiest experts to name for each layer.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON instead of a table.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRUNKLINE_API_KEY", help="Key of a server that asks for one.")
    ] = None,
) -> None:
    """Show to which experts a running server's tokens are sent; the record isn't changed."""
    import httpx

    headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
    parameters = {} if model is None else {"model": model}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60.0, trust_env=False) as client:
            answer = client.get("/expert_distribution", params=parameters)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"No answer from {url} ({error}); start a server with `trunkline serve`, or name one with --url.")
    if answer.status_code != 200:
        _fail(_refusal(answer.status_code, answer.content))
    report = answer.json()
    if as_json:
        typer.echo(json.dumps(report))
        return
    from rich.console import Console

    console = Console()
    console.print(summary(report), markup=False, highlight=False)
    console.print(table(report, top))


def summary(report: dict[str, Any]) -> str:
    """A line about the record."""
    state = "recording" if report["recording"] else "not recording"
    balance = report["balancedness"]
    return (
        f"{report['model']}: {state}, mode {report['mode']}, {report['passes']} passes, {report['tokens']} tokens, "
        f"{report['top_k']} of {report['num_experts']} experts per token, "
        f"balance {'unknown' if balance is None else f'{balance:.3f}'}"
    )


def table(report: dict[str, Any], top: int) -> Table:
    """A table with a row per layer with experts."""
    from rich.table import Table
    from rich.text import Text

    made = Table(show_edge=False, pad_edge=False)
    for name in ("Layer", "Choices", "Balance"):
        made.add_column(name, justify="right")
    made.add_column("Experts, from 0 on", no_wrap=True)
    made.add_column("Busiest (share)")
    for layer in report["layers"]:
        balance = layer["balancedness"]
        busiest = ", ".join(f"{one['expert']} ({one['share']:.1%})" for one in layer["top"][:top])
        made.add_row(
            str(layer["layer"]),
            str(layer["selections"]),
            "–" if balance is None else f"{balance:.3f}",
            Text(heat(layer["counts"])),
            busiest,
        )
    return made


def heat(counts: list[int]) -> str:
    """A character for each expert, or group of neighbouring experts, darker for higher counts; a space only for 0."""
    size = -(-len(counts) // COLUMNS)
    loads = [sum(counts[start : start + size]) for start in range(0, len(counts), size)]
    most = max(loads)
    return "".join(SHADES[-(-load * (len(SHADES) - 1) // most)] if load else SHADES[0] for load in loads)


def _refusal(status: int, body: bytes) -> str:
    """The message of an error in any of the server's formats."""
    with suppress(ValueError, AttributeError):
        answer = json.loads(body)
        error = answer.get("error", answer)
        if text := error.get("message"):
            return f"{text} (HTTP {status})"
    return f"The server answered HTTP {status}."


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
