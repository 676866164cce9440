"""Converts grammars in EBNF, as SGLang and llama.cpp (GBNF) write them, to llguidance's variant of Lark's syntax.

::

    root   ::= "yes" | number ("," number){0,3}   # the first rule to match is root
    number ::= [1-9] [0-9]*

A rule that can't reach a recursive rule becomes a terminal, a regular expression of llguidance's lexer. The lexer takes
the longest match, so what may follow a repetition in a rule of its own must not also be able to continue it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_RULES = 1000
MAX_DEPTH = 20  # of parentheses
MAX_LITERAL = 8192  # characters; the time of each mask grows with the longest one
MAX_REPEAT = 100_000

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)
    |(?P<newline>\r\n|\r|\n)
    |(?P<define>::=)
    |(?P<name>[A-Za-z_][A-Za-z0-9_-]*)
    |(?P<literal>"(?:[^"\\\r\n]|\\.)*")
    |(?P<chars>\[(?:[^\]\\\r\n]|\\.)*\])
    |(?P<repeat>[*+?]|\{[ \t]*[0-9]+[ \t]*(?:,[ \t]*[0-9]*[ \t]*)?\})
    |(?P<sign>[|().])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    line: int


@dataclass(slots=True)
class _Rule:
    """``body``: pieces of Lark's syntax; a reference to a rule is a tuple with its name."""

    line: int
    body: list[str | tuple[str]] = field(default_factory=list)

    @property
    def references(self) -> list[str]:
        return [piece[0] for piece in self.body if isinstance(piece, tuple)]


def lark_of_ebnf(text: str) -> str:
    """The grammar in Lark's syntax. ValueError, with the line, for a text that isn't such a grammar."""
    rules = _read_rules(list(_tokens(text)))
    if "root" not in rules:
        raise ValueError("there is no rule named root")
    for name, rule in rules.items():
        for other in rule.references:
            if other not in rules:
                raise ValueError(f"line {rule.line}: rule {name!r} refers to {other!r}, which is not defined")
    terminals = _terminals(rules)
    # Numbers make the names unique: Lark's are case-sensitive in another way.
    names = {name: f"T{i}" if name in terminals else f"r{i}" for i, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    for name, rule in rules.items():
        body = " ".join(piece if isinstance(piece, str) else names[piece[0]] for piece in rule.body)
        lines.append(f"{names[name]}: {body}")
    return "\n".join(lines)


def _tokens(text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"line {line}: unexpected {text[position : position + 20]!r}")
        kind = match.lastgroup or ""
        if kind != "space":
            yield _Token(kind, match[0], line)
        line += kind == "newline"
        position = match.end()


def _read_rules(tokens: list[_Token]) -> dict[str, _Rule]:
    """The rules by name. A line break ends a rule if a name and ``::=`` follow, and nothing else."""
    solid = [token for token in tokens if token.kind != "newline"]
    starts = [i for i, token in enumerate(solid) if token.kind == "define"]
    if not starts or starts[0] != 1:
        raise ValueError("line 1: a grammar begins with NAME ::=")
    if len(starts) > MAX_RULES:
        raise ValueError(f"it has {len(starts)} rules; at most {MAX_RULES} are allowed")
    rules: dict[str, _Rule] = {}
    for start, end in zip(starts, [*(later - 1 for later in starts[1:]), len(solid)], strict=True):
        name = solid[start - 1]
        if name.kind != "name":
            raise ValueError(f"line {name.line}: {name.text!r} is not the name of a rule")
        if name.text in rules:
            raise ValueError(f"line {name.line}: rule {name.text!r} is defined twice")
        rules[name.text] = rule = _Rule(name.line)
        _read_body(rule, solid[start + 1 : end])
    return rules


def _read_body(rule: _Rule, tokens: list[_Token]) -> None:
    """Append the tokens of a rule's right side to its body, as pieces of Lark's syntax."""
    depth, repeatable, empty = 0, False, True  # ``empty``: no piece since the last "|" or "("
    for token in tokens:
        if token.kind == "repeat":
            if not repeatable:
                raise ValueError(f"line {token.line}: there is nothing to repeat before {token.text!r}")
            rule.body[-1:] = _repeated(rule.body[-1], token)
            repeatable = False
            continue
        if token.text in ("|", ")") and token.kind == "sign" and empty:
            rule.body.append('""')
        if token.kind == "sign" and token.text in ("(", "|", ")"):
            depth += {"(": 1, ")": -1}.get(token.text, 0)
            if not 0 <= depth <= MAX_DEPTH:
                problem = "unexpected ')'" if depth < 0 else f"more than {MAX_DEPTH} nested parentheses"
                raise ValueError(f"line {token.line}: {problem}")
            rule.body.append(token.text)
            repeatable = token.text == ")"
            empty = not repeatable
            continue
        rule.body.append(_piece(token))
        repeatable, empty = True, False
    if depth:
        raise ValueError(f"line {rule.line}: a parenthesis of this rule is not closed")
    if empty:
        rule.body.append('""')


def _repeated(piece: str | tuple[str], token: _Token) -> list[str | tuple[str]]:
    """The last piece of a body with the repetition behind it."""
    counts = [int(number) for number in re.findall(r"[0-9]+", token.text)]
    if counts and max(counts) > MAX_REPEAT:
        raise ValueError(f"line {token.line}: {token.text} repeats more than {MAX_REPEAT} times")
    if len(counts) == 2 and counts[0] > counts[1]:
        raise ValueError(f"line {token.line}: in {token.text} the first number exceeds the second")
    return [piece, re.sub(r"\s", "", token.text)]


def _piece(token: _Token) -> str | tuple[str]:
    if token.kind == "name":
        return (token.text,)
    if token.kind == "literal":
        return _literal(_unescaped(token.text[1:-1], token.line), token.line)
    if token.kind == "chars":
        return _character_class(token.text[1:-1], token.line)
    return r"/[^\n]/"  # "."


def _unescaped(text: str, line: int) -> str:
    def character(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        return _decoded(digits, line) if digits else _LETTERS.get(match[4], match[4])

    return _ESCAPE.sub(character, text)


def _decoded(digits: str, line: int) -> str:
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"line {line}: there is no character with the code {digits}")
    return chr(code)


def _literal(text: str, line: int) -> str:
    if len(text) > MAX_LITERAL:
        raise ValueError(f"line {line}: a literal may have at most {MAX_LITERAL} characters, got {len(text)}")
    return "/" + "".join(map(_regex_character, text)) + "/" if text else '""'


def _character_class(text: str, line: int) -> str:
    """A regular expression for ``[a-z]``. Each character is written as its code, so that none has a meaning."""
    negated = text.startswith("^")
    parts: list[str] = []
    position = int(negated)
    while position < len(text):
        escape = _ESCAPE.match(text, position)
        if escape is None and text[position] == "-" and parts and position + 1 < len(text):
            parts.append("-")
            position += 1
            continue
        width = len(escape[0]) if escape else 1
        parts.append(_regex_character(_unescaped(text[position : position + width], line)))
        position += width
    if not parts:
        raise ValueError(f"line {line}: an empty character class")
    return f"/[{'^' if negated else ''}{''.join(parts)}]/"


def _regex_character(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\u{{{ord(character):x}}}"


def _terminals(rules: dict[str, _Rule]) -> set[str]:
    """The rules that refer to terminals only: all that can't reach a rule that is recursive."""
    users: dict[str, set[str]] = {name: set() for name in rules}
    missing = {name: len(set(rule.references)) for name, rule in rules.items()}
    for name, rule in rules.items():
        for other in rule.references:
            users[other].add(name)
    ready = [name for name, count in missing.items() if count == 0]
    terminals: set[str] = set()
    while ready:
        name = ready.pop()
        if name == "root":
            continue
        terminals.add(name)
        for user in users[name]:
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
    return terminals
