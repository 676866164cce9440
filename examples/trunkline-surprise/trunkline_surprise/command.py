"""The task from the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from trunkline.core.errors import TrunklineError


def surprise(
    text: str, url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:30000"
) -> None:
    """How surprising is a text to the model of a running server?"""
    import httpx

    try:
        response = httpx.post(f"{url}/surprise", json={"text": text}, timeout=60)
    except httpx.HTTPError as error:
        raise TrunklineError(f"No answer from {url}: {error}. Start a server with `trunkline serve`.") from None
    if response.status_code != 200:
        raise TrunklineError(response.text)
    answer = response.json()
    print(f"{answer['bits_per_token']:.2f} bits a token over {answer['tokens']} tokens")
