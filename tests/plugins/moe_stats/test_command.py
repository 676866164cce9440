"""``trunkline experts`` against a server's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from trunkline.plugins.moe_stats import command, trunkline_commands
from trunkline.plugins.moe_stats.report import report
from trunkline.plugins.moe_stats.schemas import Snapshot

REPORT = report(
    Snapshot(
        model="tiny", mode="stat", recording=True, passes=3, tokens=4, top_k=2, depth=3, experts=4,
        layers=[1, 2], counts=[[0, 6, 1, 1], [2, 2, 2, 2]],
    )
)  # fmt: skip

Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``run(answer, "--flag")``: the command's result; ``answer`` plays the server."""
    real = httpx.Client

    def invoke(answer: Answer, *flags: str) -> Any:
        monkeypatch.setattr(httpx, "Client", lambda **options: real(**options, transport=httpx.MockTransport(answer)))
        app = typer.Typer()
        trunkline_commands(app)
        return CliRunner().invoke(app, list(flags))

    return invoke


def test_a_table(run: Callable[..., Any]) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=REPORT)

    result = run(answer, "--model", "a b", "--api-key", "secret", "--top", "2")
    assert result.exit_code == 0
    assert seen[0].url.path == "/expert_distribution"
    assert seen[0].url.params["model"] == "a b"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert "tiny: recording, mode stat, 3 passes, 4 tokens, 2 of 4 experts per token, balance 0.667" in result.output
    first, second = ([cell.strip() for cell in line.split("│")] for line in result.output.splitlines()[-2:])
    assert first == ["1", "8", "0.333", "█░░", "1 (75.0%), 2 (12.5%)"]
    assert second[:4] == ["2", "8", "1.000", "████"]


def test_json(run: Callable[..., Any]) -> None:
    result = run(lambda _: httpx.Response(200, json=REPORT), "--json")
    assert json.loads(result.output) == REPORT


def test_a_record_of_nothing(run: Callable[..., Any]) -> None:
    empty = report(
        Snapshot(
            model="tiny", mode="stat", recording=False, passes=0, tokens=0, top_k=0, depth=1, experts=4,
            layers=[0], counts=[[0, 0, 0, 0]],
        )
    )  # fmt: skip
    result = run(lambda _: httpx.Response(200, json=empty))
    assert result.exit_code == 0
    assert "not recording" in result.output
    assert "balance unknown" in result.output


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(400, json={"error": {"message": "it is dense"}}), "it is dense (HTTP 400)"),
        (httpx.Response(503, json={"message": "try later"}), "try later (HTTP 503)"),
        (httpx.Response(404, text="?"), "The server answered HTTP 404."),
        (httpx.Response(500, json=["?"]), "The server answered HTTP 500."),
    ],
)
def test_refusals_are_told(run: Callable[..., Any], answer: httpx.Response, message: str) -> None:
    result = run(lambda _: answer)
    assert (result.exit_code, result.output.strip()) == (1, message)


def test_no_server(run: Callable[..., Any]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    result = run(refuse)
    assert result.exit_code == 1
    assert "trunkline serve" in result.output


def test_many_experts_share_columns() -> None:
    assert command.heat([0, 0, 1, 0] * 32) == " █" * 32  # two a column
    assert len(command.heat([1] * 65)) == 33
    assert command.heat([0, 1, 100]) == " ░█"
