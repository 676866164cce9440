"""Names and prose use the field's standard terms: words that a reviewer had to decode stay out."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = {
    "Patience": "WatchdogLimits",
    "Wish": "EmbeddingRequest",
    "Found": "Plugin",
    "Early": "StartupSelection",
    "Doorkeeper": "Authorizer",
    "Walk": "FusedForward",
    "ROLLING": "READY_MESSAGE",
    "LAST_WORDS": "SHUTDOWN_SECONDS",
    "_hurry": "_stop_now",
    "unlucky": "to_displace",
    "orders": "start_options",
    "dress": "preprocess",
    "WaitingRoom": "QueueLimits",
    "Suspects": "CrashSuspects",
    "Facts": "InfoReplies",
    "Grant": "MemoryShare",
    "Holding": "SlotAllocation",
    "Draft": "BatchDraft",
    "OnlyNull": "UnsupportedUnlessNull",
    "Accounting": "IgnoredAccountingField",
    "goes_on": "continues",
}
"""A name that was flagged, and what describes the same thing."""

AMOUNTS = (
    "once|one|bytes|ms|call|entry|experts?|ids?|line|numbers?|object|record|requests?|rows?|score|slots?|tokens?|values?|"
    "vector"
)
UNITS = (
    "core|document|input|item|kind|label|layer|model|pass|plugin|process|prompt|request|row|sequence|step|text|thread|"
    "token"
)
PHRASES = {
    r"so many": "a number, or `up to N`",
    rf"(?:{AMOUNTS}) (?-i:an?) (?:{UNITS})": "per …",
    r"(?:bytes|requests|tokens) a second": "per second",
    r"kin": "similar models, related routes",
    r"nobody|whoever|anybody": "who it is: no client, no plugin, the front",
    r"to oneself": "warm-up request",
    r"for granted": "exempt from garbage collection",
    r"wants out": "stops without draining",
    r"no news": "what is logged, or isn't, and why",
    r"politely": "what is sent, and how long is waited",
    r"last word": "last message",
    r"blotted out": "replaced by ***",
    r"stands? in for": "replaces, is used in place of",
    r"hangs? up|hung up": "disconnects",
}
"""A phrase in comments, docstrings, texts and pages, and what to write instead."""

GENERATED = ("architectures.md",)  # the errors of the sweep, with texts of transformers

SAME_NAME = {"ModelInfo"}  # core.types' and that of a reply, whose name is in /openapi.json
FSTRING = [getattr(tokenize, name, -1) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")]  # since 3.12
QUOTES = re.compile(r"""^\w*(\"{3}|'{3}|"|')(.*)\1$""", re.DOTALL)


def identifiers(tree: ast.AST) -> Iterator[str]:
    """All names that a file defines: classes, functions, arguments, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and strings of a source file.

    Comments on consecutive lines are one text, and so are strings that Python concatenates.
    """
    line, kind, pieces, depth = 0, 0, [""], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found, piece = token.type, token.string
        if found in FSTRING:
            depth += (found == FSTRING[0]) - (found == FSTRING[2])
            found, piece = tokenize.STRING, piece if found == FSTRING[1] else ""
        elif found == tokenize.STRING and (quoted := QUOTES.match(piece)):
            piece = quoted[2]
        elif found == tokenize.COMMENT:
            piece = piece.lstrip("#")
        elif found == tokenize.NL or depth:  # the expressions in an f-string don't end it
            continue
        if found != kind:
            yield line, " ".join("".join(pieces).split())
            line, kind, pieces = token.start[0], found, []
        if found in (tokenize.STRING, tokenize.COMMENT):
            pieces.append(piece)
    yield line, " ".join("".join(pieces).split())


def flagged(text: str) -> list[str]:
    """What to write instead of the phrases in a text."""
    return [
        f"{match.group()!r}: write {instead}"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(rf"\b(?:{phrase})\b", text, re.IGNORECASE)
    ]


def test_flagged_names_stay_out(sources: dict[str, Any]) -> None:
    found = [
        f"{source.name}: {name}, write {NAMES[name]}"
        for source in sources.values()
        for name in identifiers(source.tree)
        if name in NAMES
    ]
    assert found == []


def test_flagged_phrases_stay_out_of_the_source(sources: dict[str, Any], repository: Path) -> None:
    texts = {source.name: source.text for source in sources.values()}
    for folder in ("examples", "benchmarks", "docs"):
        texts |= {path.name: path.read_text() for path in (repository / folder).rglob("*.py")}
    found = [
        f"{name}, line {line}: {problem}"
        for name, source in texts.items()
        for line, text in prose(source)
        for problem in flagged(text)
    ]
    assert found == []


def test_flagged_phrases_stay_out_of_pages(repository: Path) -> None:
    pages = [path for folder in ("docs", "examples") for path in (repository / folder).rglob("*.md")]
    pages += repository.glob("*.md")
    found = [
        f"{page.name}: {problem}"
        for page in pages
        if page.name not in GENERATED
        for problem in flagged(" ".join(page.read_text().split()))
    ]
    assert found == []


def test_a_class_of_core_has_a_name_of_its_own(sources: dict[str, Any]) -> None:
    owners: dict[str, list[str]] = defaultdict(list)
    for source in sources.values():
        if source.name.startswith("core."):
            for node in source.tree.body:
                if isinstance(node, ast.ClassDef):
                    owners[node.name].append(source.name)
    assert {name: files for name, files in owners.items() if len(files) > 1 and name not in SAME_NAME} == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# one a pass", 1),
        ('"""RoBERTa and its kin"""', 1),
        ('f"{n} of so many"', 1),
        ("kinds = 'one per pass'", 0),
        ("x = 1\n# so\n# many", 1),
        ("x = 1  # so\nmany = 1  # many", 0),
        ("f('so ', 'many', so, 'many')", 0),
        ("raise E(\n    f'{n} of so '\n    'many'\n)", 1),
        ("'one id an input, 5 tokens a pass'", 2),
        ("'bytes a second, but once a second'", 1),
    ],
)
def test_a_phrase_is_found_in_comments_and_strings(text: str, count: int) -> None:
    assert sum(len(flagged(piece)) for _, piece in prose(text)) == count


def test_a_name_is_found_wherever_it_is_defined() -> None:
    tree = ast.parse("class Wish: ...\ndef f(dress): self._hurry = 1\nfor unlucky in (): ...\nprint(orders)")
    assert sorted(name for name in identifiers(tree) if name in NAMES) == ["Wish", "_hurry", "dress", "unlucky"]
