"""Which form of contents a template needs; what is rendered then is what transformers renders of that form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trunkline.core.server.api import chat_templates
from trunkline.core.server.api.chat_templates import (
    contents_for_template,
    goes_through_parts,
    needs_parts,
    template_variables,
)

pytestmark = pytest.mark.field

LOOP = "{% for p in CONTENT %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
EACH = "{% for m in messages %}{{ m.role }}: BODY\n{% endfor %}"


def over(content: str, body: str = LOOP) -> str:
    """A template whose messages show the parts of ``content``."""
    return EACH.replace("BODY", body.replace("CONTENT", content))


PARTS = {
    "attribute": over("m.content"),
    "item": over("m['content']"),
    "get": over("m.get('content')"),
    "get with a default": over("m.get('content', [])"),
    "filtered": over("m.content | selectattr('type', 'equalto', 'text')"),
    "or empty": over("(m.content or [])"),
    "sliced": over("m.content[:]"),
    "indexed": over("", "{{ m.content[0].text }}"),
    "indexed by items": over("", "{{ m['content'][0]['text'] }}"),
    "first": over("", "{{ (m.content | first).text }}"),
    "mapped": over("", "{{ m.content | map(attribute='text') | join }}"),
    "assigned": over("c", "{% set c = m.content %}" + LOOP),
    "assigned in turns": over("b", "{% set a = m.content %}{% set b = a %}" + LOOP),
    "in a namespace": over("ns.c", "{% set ns = namespace(c='') %}{% set ns.c = m.content %}" + LOOP),
    "with": over("c", "{% with c = m.content %}" + LOOP + "{% endwith %}"),
    "in a macro": "{% macro show(c) %}"
    + LOOP.replace("CONTENT", "c")
    + "{% endmacro %}"
    + over("", "{{ show(m.content) }}"),
    "in a macro by name": "{% macro show(c) %}"
    + LOOP.replace("CONTENT", "c")
    + "{% endmacro %}"
    + over("", "{{ show(c=m.content) }}"),
    "of a message by index": "{% for i in range(messages | length) %}"
    + "{% set m = messages[i] %}{{ m.role }}: "
    + LOOP.replace("CONTENT", "m.content")
    + "\n{% endfor %}",
    "of other messages": "{% set rest = messages[0:] if messages else messages %}"
    + over("m.content").replace("in messages", "in rest"),
    "of contents": "{% for c in messages | map(attribute='content') %}"
    + LOOP.replace("CONTENT", "c")
    + "\n{% endfor %}",
    "of the last": LOOP.replace("CONTENT", "(messages | map(attribute='content') | list | last)"),
    "in a generation block": over("m.content", "{% generation %}" + LOOP + "{% endgeneration %}"),
    "with continue": over("m.content", LOOP.replace("{% if", "{% if not p %}{% continue %}{% endif %}{% if")),
    "iterable is no answer": over("m.content", "{% if m.content is iterable %}" + LOOP + "{% endif %}"),
    "strings elsewhere": over(
        "m.content",
        "{% if m.role == 'user' %}"
        + LOOP
        + "{% elif m.content is string %}{{ m.content }}{% else %}"
        + LOOP
        + "{% endif %}",
    ),
}
# The syntax tree shows no use of parts in these.
PROBED_PARTS = {
    "a part in a name": over("", "{% set c = m['content'][0] %}{{ c['text'] }}"),
    "a part with get": over("", "{{ m['content'][0].get('text') }}"),
    "parts by index": over(
        "", "{% for i in range(m.content | length) %}{% set p = m.content[i] %}{{ p.text }}{% endfor %}"
    ),
    "messages in a namespace": "{% set ns = namespace(l=messages) %}"
    + over("m.content").replace("in messages", "in ns.l"),
    "two names at once": over("b", "{% set a, b = m.role, m.content %}" + LOOP),
    "attr": over("(m | attr('get'))('content')"),
    "in batches": over("", "{% for b in m.content | batch(1) %}{{ b[0].text }}{% endfor %}"),
    "in slices": over("", "{% for b in m.content | slice(1) %}{{ b[0].text }}{% endfor %}"),
    "a list of contents": over("", "{% for c in [m.content] %}{{ c[0].text }}{% endfor %}"),
    "a list of pairs": over("", "{% for role, c in [(m.role, m.content)] %}{{ c[0].text }}{% endfor %}"),
    "grouped": over("", "{% for _, l in m.content | groupby('type') %}{{ l[0].text }}{% endfor %}"),
    "in a called block": "{% macro each(m) %}{{ caller(m.content[0]) }}{% endmacro %}"
    + over("", "{% call(p) each(m) %}{{ p.text }}{% endcall %}"),
    "only the system's": "{% for m in messages %}{{ m.role }}: {% if m.role != 'system' %}"
    + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    + "{% else %}{% set p = m.content[0] %}{{ p.text }}{% endif %}\n{% endfor %}",
    "alternating roles": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    + "{{ raise_exception('roles must alternate') }}{% endif %}{% set p = m.content[0] %}{{ p.text }}{% endfor %}",
    "raises for a string": over(
        "",
        "{% if m.content is string %}{{ raise_exception('give me parts') }}{% endif %}"
        "{% set p = m.content[0] %}{{ p.text }}",
    ),
}
# By the syntax tree, these go through parts.
PROBED_STRINGS = {
    "raises for parts": over(
        "",
        "{% if m.content is not string %}{{ raise_exception('give me a string') }}{% endif %}"
        "{% for c in m.content %}{{ c }}{% endfor %}",
    ),
    "goes through characters": over("", "{% for c in m.content %}{{ c }}{% endfor %}"),
}
STRINGS = {
    "printed": over("", "{{ m.content }}"),
    "trimmed": over("", "{{ m['content'] | trim }}"),
    "joined": over("", "{{ '<' + m.content + '>' }}"),
    "lines": over("", "{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}"),
    "a character": over("", "{{ m.content[0] }}{{ m.content[1:] }}"),
    "other lists": over("", "{{ m.content }}{% for t in m.tool_calls %}{{ t.type }}{% endfor %}"),
    "names that hold other things": over("", "{{ m.content }}{% for c in m.calls %}{{ c.type }}{% endfor %}")
    + "{% set c = messages[0].content %}{{ c }}",
    "handled both": over("m.content", "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"),
    "handled both, the other way round": over(
        "m.content", "{% if m.content is not string %}" + LOOP + "{% else %}{{ m.content }}{% endif %}"
    ),
    "handled both in elif": over(
        "m.content",
        "{% if m.content is none %}{% elif m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}",
    ),
    "handled both in an expression": over(
        "", "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"
    ),
    "handled both in a macro": "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}"
    + LOOP.replace("CONTENT", "c")
    + "{% endif %}{% endmacro %}"
    + over("", "{{ show(m.content) }}"),
}


@pytest.fixture
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(contents_for_template(tokenizer, messages), tokenize=False))


FORMS = {"parts": PARTS | PROBED_PARTS, "strings": STRINGS | PROBED_STRINGS}
SAID = (("user", "What is\nthe capital?"), ("assistant", "Paris."), ("user", "Of?"))


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.mark.parametrize(("form", "name"), [(form, name) for form in FORMS for name in FORMS[form]])
def test_both_forms_from_clients_give_what_transformers_gives(tokenizer: Any, form: str, name: str) -> None:
    tokenizer.chat_template = FORMS[form][name]
    strings: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in SAID]
    if name == "only the system's":
        strings.insert(0, {"role": "system", "content": "Be brief."})
    parts = as_parts(strings)
    expected = tokenizer.apply_chat_template(parts if form == "parts" else strings, tokenize=False)
    assert rendered(tokenizer, strings) == rendered(tokenizer, parts) == expected
    for message in strings if name != "of the last" else strings[-1:]:
        assert all(line in expected for line in message["content"].split("\n"))
    assert goes_through_parts(tokenizer.chat_template) == (name in PARTS or name in PROBED_STRINGS)


@pytest.mark.parametrize("set_up", ["{% set p = m.content[0] %}", ""])
def test_a_reranker_with_roles_of_its_own(tokenizer: Any, set_up: str) -> None:
    shown = "{{ p.text }}" if set_up else "{{ m.content }}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['query', 'document'] %}{{ raise_exception('no') }}{% endif %}"
        f"{set_up}{{{{ m.role }}}}: {shown} {{% endfor %}}"
    )
    turns = [{"role": "query", "content": "why?"}, {"role": "document", "content": "So."}]
    assert rendered(tokenizer, turns) == "query: why? document: So. "


@pytest.mark.parametrize("body", ["{{ m | attr('content') }}", "{{ m.text }}", "{{ raise_exception('no') }}"])
def test_a_template_that_shows_neither_form_gets_strings(tokenizer: Any, body: str) -> None:
    tokenizer.chat_template = over("", body)  # attr: a message is a dict, whose items are no attributes
    assert not needs_parts(tokenizer)


def test_a_template_is_probed_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = over("", "{% set only_here = m.content[0] %}{{ only_here.text }}")
    calls = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or apply(*a, **k))
    assert needs_parts(tokenizer)
    assert calls
    calls.clear()
    assert needs_parts(tokenizer)
    assert calls == []


@pytest.mark.parametrize(("body", "parts"), [("{{ m.content }}", False), (LOOP.replace("CONTENT", "m.content"), True)])
def test_a_probe_that_takes_too_long_leaves_it_to_the_syntax_tree(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, body: str, parts: bool
) -> None:
    monkeypatch.setattr(chat_templates, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = over("", body) + endless
    assert needs_parts(tokenizer) is parts


def test_several_parts(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    tokenizer.chat_template = STRINGS["printed"]
    assert rendered(tokenizer, messages) == "user: one two\n"
    tokenizer.chat_template = over("m.content", "{% for p in CONTENT %}[{{ p.text }}]{% endfor %}")
    assert rendered(tokenizer, messages) == "user: [one ][two]"


def test_named_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": STRINGS["printed"], "default": PARTS["attribute"]}
    assert rendered(tokenizer, [{"role": "user", "content": "hi"}]) == "user: hi"


def test_no_template(tokenizer: Any) -> None:
    assert contents_for_template(tokenizer, [{"role": "user", "content": "hi"}]) == [{"role": "user", "content": "hi"}]
    assert template_variables(tokenizer) == frozenset()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{% for m in messages %}" * 2000,
        "{{ messages | nosuchfilter }}",
    ],
)
def test_broken_templates_get_strings(template: str) -> None:
    tokenizer: Any = SimpleNamespace(chat_template=template)
    message = {"role": "user", "content": "hi"}
    assert contents_for_template(tokenizer, [message]) == [message]
    assert isinstance(template_variables(tokenizer), frozenset)


def test_a_long_template_is_read_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that depend on one another in the worst order; a template belongs to the checkpoint's author."""
    count = 2000
    template = "".join(f"{{% set a{i} = a{i + 1} %}}" for i in range(count)) + f"{{% set a{count} = messages %}}"
    calls = 0
    of = chat_templates._Values.of

    def counted(self: Any, node: Any) -> set[str]:
        nonlocal calls
        calls += 1
        return of(self, node)

    monkeypatch.setattr(chat_templates._Values, "of", counted)
    assert not goes_through_parts(template)
    assert calls <= 2 * chat_templates.ROUNDS * count


def test_variables_that_a_template_reads() -> None:
    template = (
        "{% if not reasoning_effort is defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
        "{% set own = 1 %}{{ own }}{{ reasoning_effort }}{% if enable_thinking %}{{ messages[0].content }}{% endif %}"
    )
    tokenizer: Any = SimpleNamespace(chat_template=template)
    assert template_variables(tokenizer) == {"reasoning_effort", "enable_thinking", "messages"}
