"""The examples of the documentation, run as they stand against a server with a model for every task."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest

HOST = "localhost:30000"
PAGES = ("README.md", "docs/api.md", "docs/embedding.md")


@pytest.fixture
def url(fleet: Any) -> str:
    return str(fleet.url)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each curl command in the page's console blocks."""
    found = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE):
            if part.startswith("curl "):
                found.append(arguments(part.splitlines()))
    return found


def arguments(lines: list[str]) -> list[str]:
    """The words of the command at the beginning of ``lines``; what follows it is its output."""
    for count in range(1, len(lines) + 1):
        try:
            return shlex.split("\n".join(lines[:count]).replace("\\\n", " "), comments=True)
        except ValueError:  # a quotation or a line that goes on
            continue
    raise AssertionError(lines)


def run(words: list[str], url: str) -> httpx.Response:
    """What curl does with ``-s``, ``-X``, ``-H`` and ``-d``."""
    method, headers, data, target = "", {"content-type": "application/x-www-form-urlencoded"}, None, ""
    rest = iter(words[1:])
    for word in rest:
        if word == "-X":
            method = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(":")
            headers[name.lower()] = value.strip()
        elif word == "-d":
            data = next(rest)
        elif word != "-s":
            assert not target, words
            assert not word.startswith("-"), words
            target = word
    assert target.startswith(HOST), words
    return httpx.request(
        method or ("GET" if data is None else "POST"),
        url + target.removeprefix(HOST),
        headers=headers,
        content=data,
        timeout=60,
    )


@pytest.mark.field
@pytest.mark.parametrize("page", PAGES)
def test_every_curl_example_works(page: str, repository: Path, url: str) -> None:
    found = commands(repository / page)
    assert found
    for words in found:
        answer = run(words, url)
        assert answer.status_code == 200, (words, answer.text)


@pytest.mark.field
def test_the_openai_example_works(repository: Path, url: str) -> None:
    [example] = blocks(repository / "docs/openai.md", "python")
    names: dict[str, Any] = {}
    exec(example.replace(f"http://{HOST}", url), names)
    assert names["answer"].choices[0].finish_reason in ("stop", "length")
    names["client"].close()


def test_an_example_is_read_to_its_end(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ curl -s a \\\n    -d '{\n}'  # so\n{\"output\": 1}\n$ other\n$ curl b\n```\n")
    assert commands(page) == [["curl", "-s", "a", "-d", "{\n}"], ["curl", "b"]]
