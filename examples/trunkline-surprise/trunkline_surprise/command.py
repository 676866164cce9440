"""The task from the terminal."""

from __future__ import annotations

from typing import Annotated

import typer


def surprise(
    text: str, url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:30000"
) -> None:
    """How surprising is a text to the model of a running server?"""
    import httpx

    response = httpx.post(f"{url}/surprise", json={"text": text}, timeout=60)
    if response.status_code != 200:
        raise typer.BadParameter(response.text)
    answer = response.json()
    print(f"{answer['bits_per_token']:.2f} bits a token over {answer['tokens']} tokens")
