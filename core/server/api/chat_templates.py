"""Detects which form of message contents a chat template needs, by rendering test messages and by its syntax tree.

Templates are written for one of two forms of a message's ``content``: a string, or a list of parts
``{"type": "text", "text": …}``. With the other form, most templates raise no error: one that needs parts omits a
string, and one that needs strings prints the list in Python's notation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from trunkline.core.types import Tokenizer

from .deadline import TEMPLATE_SECONDS, TookTooLong, deadline

log = logging.getLogger("trunkline.server")

TAG = re.compile(r"\{%[-+]?\s*(\w+)")
ROUNDS = 16  # longest chain of assignments that is followed
ELEMENTS = {"messages": "message", "contents": "content", "content": "part"}
SAME = {"default", "d", "list", "reject", "reverse", "select", "sort", "unique"}  # filters that keep the kind of value
PART_KEYS = {"text", "type"}
CHOOSE = {"selectattr", "rejectattr"}  # filters that read attributes of the elements, and keep the kind of value
MARKER = "50273916840"  # the text of test messages; digits, because templates may change the case of letters
# Roles of test conversations; templates refuse or leave out roles that they don't know. The last are those of
# templates that compare two texts.
PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",), ("query", "document"))

_decided: dict[str, bool] = {}  # template -> whether it needs parts; a server has at most one template per model


def contents_for_template(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every ``content`` (a string or a list of text parts) in the form that the template needs."""
    shape = _as_parts if needs_parts(tokenizer) else _as_string
    return [message | {"content": shape(message["content"])} for message in messages]


def template_variables(tokenizer: Tokenizer) -> frozenset[str]:
    """Names of the variables that the tokenizer's chat template reads and doesn't set itself."""
    tree = _parse(template_of(tokenizer))
    try:
        return frozenset() if tree is None else frozenset(meta.find_undeclared_variables(tree))
    except (TemplateSyntaxError, RecursionError):  # it can't be rendered either
        return frozenset()


def template_of(tokenizer: Tokenizer) -> str:
    """The default chat template, "" when there is none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # of named templates
        template = template.get("default")
    return template or ""


def template_text(tokenizer: Tokenizer) -> str:
    """All chat templates of a tokenizer as one text, "" when there is none."""
    template: Any = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def needs_parts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's chat template needs lists of parts.

    It does if it renders the text of parts but not of strings. If it renders both or neither, or if rendering takes
    too long, the syntax tree decides. Each template is tested once.
    """
    template = template_of(tokenizer)
    if template and template not in _decided:
        _decided[template] = _decide(tokenizer, template)
    return _decided.get(template, False)


def _decide(tokenizer: Tokenizer, template: str) -> bool:
    try:
        with deadline(TEMPLATE_SECONDS):
            for roles in PROBES:
                strings, parts = (_keeps_text(tokenizer, roles, shape) for shape in (_as_string, _as_parts))
                if strings != parts:
                    return parts
                if strings:
                    break
    except TookTooLong:
        log.warning("a probe of the chat template took more than %g s; its syntax tree is used", TEMPLATE_SECONDS)
    return goes_through_parts(template)


def _keeps_text(tokenizer: Tokenizer, roles: Sequence[str], shape: Callable[[str], Any]) -> bool:
    """Whether the texts of all messages are rendered, other than inside a list in Python's notation."""
    texts = [f"{MARKER}{index}" for index in range(len(roles))]
    messages = [{"role": role, "content": shape(text)} for role, text in zip(roles, texts, strict=True)]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TookTooLong:
        raise
    except Exception:  # a template may raise anything
        return False
    return all(text in rendered.replace(f"'text': '{text}'", "") for text in texts)


def goes_through_parts(template: str) -> bool:
    """Whether, by its syntax tree, the template accesses the parts of a content without testing for a string first.

    False for a template that can't be parsed, and for one that handles both forms.
    """
    tree = _parse(template)
    if tree is None:
        return False
    try:
        values = _Values(tree)
        return any(values.looks_into_content(node) for node in _without_string_test(tree, values))
    except RecursionError:
        return False


def _as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_string(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class _Blocks(Extension):
    """Parses block tags that jinja2 itself doesn't have, such as the one that transformers adds, as their content."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        tag = next(parser.stream).value
        return parser.parse_statements((f"name:end{tag}",), drop_needle=True)


@lru_cache(maxsize=64)
def _parse(template: str) -> nodes.Template | None:
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Blocks])
    tags = set(TAG.findall(template))
    environment.extensions[_Blocks.identifier].tags = {tag for tag in tags if f"end{tag}" in tags}
    try:
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        log.warning("the chat template can't be parsed: %s", error)
        return None


class _Values:
    """The kinds of values of a template's expressions: the messages, one message, a content, or a part of it.

    Values are followed through assignments, loops and calls of macros, without regard to scope and order.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._names: dict[str, set[str]] = {"messages": {"messages"}}
        macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        bindings = [*_bindings(tree, macros)]
        for _ in range(ROUNDS):
            before = sum(map(len, self._names.values()))
            for name, value, element in bindings:
                kinds = self.of(value)
                self._names.setdefault(name, set()).update(_elements(kinds) if element else kinds)
            if sum(map(len, self._names.values())) == before:
                return

    def of(self, node: nodes.Node | None) -> set[str]:
        """The kinds of value that an expression may have; other kinds are left out."""
        match node:
            case nodes.Name():
                return self._names.get(node.name, set())
            case nodes.Getattr():
                return self._attribute(node.node, node.attr)
            case nodes.Getitem(arg=nodes.Const(value=str(key))):
                return self._attribute(node.node, key)
            case nodes.Getitem(arg=nodes.Slice()):
                return self.of(node.node)
            case nodes.Getitem():
                return _elements(self.of(node.node))
            case nodes.Call(node=nodes.Getattr(node=owner, attr="get"), args=[nodes.Const(value=str(key)), *_]):
                return self._attribute(owner, key)
            case nodes.Filter():
                return self._filtered(node)
            case nodes.CondExpr():
                return self.of(node.expr1) | self.of(node.expr2)
            case nodes.Or() | nodes.And():
                return self.of(node.left) | self.of(node.right)
            case nodes.Add():
                return (self.of(node.left) | self.of(node.right)) & {"messages"}
        return set()

    def _attribute(self, owner: nodes.Node, name: str) -> set[str]:
        stored = self._names.get(f"{owner.name}.{name}", set()) if isinstance(owner, nodes.Name) else set()
        return stored | ({"content"} if name == "content" and "message" in self.of(owner) else set())

    def _filtered(self, node: nodes.Filter) -> set[str]:
        kinds = self.of(node.node)
        if node.name in SAME or node.name in CHOOSE:
            return kinds
        if node.name in ("first", "last"):
            return _elements(kinds)
        takes_content = any(pair.key == "attribute" and _is(pair.value, "content") for pair in node.kwargs)
        return {"contents"} if node.name == "map" and takes_content and "messages" in kinds else set()

    def looks_into_content(self, node: nodes.Node) -> bool:
        """Whether this node uses a content as a list of parts."""
        match node:
            case nodes.For():
                return "content" in self.of(node.iter)
            case nodes.Filter(name=name, node=value):
                return (name in CHOOSE or name == "map") and "content" in self.of(value)
            case nodes.Getattr(node=owner, attr=name) | nodes.Getitem(node=owner, arg=nodes.Const(value=name)):
                # Not for names: the same name may have another kind of value elsewhere.
                return name in PART_KEYS and not isinstance(owner, nodes.Name) and "part" in self.of(owner)
        return False

    def asks_for_string(self, test: nodes.Node) -> bool:
        """Whether a condition tests if a content is a string."""
        tests = (test, *test.find_all(nodes.Test))
        return any(isinstance(t, nodes.Test) and t.name == "string" and "content" in self.of(t.node) for t in tests)


def _elements(kinds: set[str]) -> set[str]:
    return {ELEMENTS[kind] for kind in kinds if kind in ELEMENTS}


def _is(node: nodes.Node, value: str) -> bool:
    return isinstance(node, nodes.Const) and node.value == value


def _bindings(tree: nodes.Template, macros: dict[str, nodes.Macro]) -> Iterator[tuple[str, nodes.Node, bool]]:
    """All assignments of a template: (name, value, whether the name gets the value's elements)."""
    for node in tree.find_all((nodes.Assign, nodes.For, nodes.With, nodes.Call)):
        match node:
            case nodes.Assign(target=nodes.Name(name=name)):
                yield name, node.node, False
            case nodes.Assign(target=nodes.NSRef(name=name, attr=attr)):
                yield f"{name}.{attr}", node.node, False
            case nodes.For(target=nodes.Name(name=name)):
                yield name, node.iter, True
            case nodes.With():
                pairs = zip(node.targets, node.values, strict=True)
                yield from ((target.name, value, False) for target, value in pairs if isinstance(target, nodes.Name))
            case nodes.Call(node=nodes.Name(name=name)) if name in macros:
                parameters = [parameter.name for parameter in macros[name].args]
                yield from ((one, value, False) for one, value in zip(parameters, node.args, strict=False))
                yield from ((pair.key, pair.value, False) for pair in node.kwargs)


def _without_string_test(node: nodes.Node, values: _Values) -> Iterator[nodes.Node]:
    """The nodes that aren't below a condition that tests if a content is a string."""
    if isinstance(node, nodes.CondExpr) and values.asks_for_string(node.test):
        return
    if isinstance(node, nodes.If):
        yield from _branches(node, values)
        return
    yield node
    for child in node.iter_child_nodes():
        yield from _without_string_test(child, values)


def _branches(node: nodes.If, values: _Values) -> Iterator[nodes.Node]:
    for branch in (node, *node.elif_):
        if values.asks_for_string(branch.test):
            return  # this branch and those that follow
        for child in (branch.test, *branch.body):
            yield from _without_string_test(child, values)
    for child in node.else_:
        yield from _without_string_test(child, values)
