"""Tool calls of earlier answers reach chat templates in the form that these render."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trunkline.core.errors import RequestError
from trunkline.core.server.api.chat_messages import ChatMessages, read_messages
from trunkline.core.server.api.chat_prompts import TemplateOptions, render_chat, takes_tools, template_options

CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Zürich", "n": [1]}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]
EACH = "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
CALLS = EACH + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
END = "{% endfor %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
JSON_TEXT = '{"city": "Zürich", "n": [1]}'
WITHOUT_CONTENT = (
    EACH + "{% if m.tool_calls and m.content is not defined %}{% for c in m.tool_calls %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer_with() -> Callable[[str], Any]:
    """A function from a chat template to a tokenizer that has it."""

    def make(template: str) -> Any:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        tokenizer.chat_template = template
        return tokenizer

    return make


def read(*messages: Any) -> list[dict[str, Any]]:
    return read_messages(msgspec.convert(list(messages), ChatMessages))


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (CALLS + "{{ c.function.arguments | tojson }}" + END, f"get{JSON_TEXT}"),
        (CALLS + "{{ c.function.arguments }}" + END, f"get{JSON_TEXT}"),
        (
            CALLS + "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}" + END,
            "get<city>Zürich<n>[1]",
        ),
        (CALLS + "{{ ' ' + c.function.arguments }}" + END, f"get {JSON_TEXT}"),
        (WITHOUT_CONTENT, f"get{JSON_TEXT}"),
    ],
)
def test_arguments_are_rendered_as_json(tokenizer_with: Any, template: str, rendered: str) -> None:
    text = render_chat(tokenizer_with(template), read(*CALLED), "m", TemplateOptions())
    assert text == f"user:Weather?assistant:{rendered}tool:rain"


def test_tools_reach_the_template(tokenizer_with: Any) -> None:
    tools = [{"type": "function", "function": {"name": "get"}}]
    tokenizer = tokenizer_with(CALLS + END)
    options = template_options(
        tokenizer, add_generation_prompt=None, continue_final_message=None, variables=None, effort=None, tools=tools
    )
    text = render_chat(tokenizer, read({"role": "user", "content": "a"}), "m", options)
    assert text == 'user:a[{"type": "function", "function": {"name": "get"}}]'


@pytest.mark.parametrize(("template", "taken"), [(CALLS + END, True), (EACH + "{% endfor %}", False)])
def test_templates_that_take_tools(tokenizer_with: Any, template: str, taken: bool) -> None:
    assert takes_tools(tokenizer_with(template)) == taken
    assert takes_tools(tokenizer_with({"default": template, "tool_use": "x"}))


@pytest.mark.parametrize(
    ("call", "field", "message"),
    [
        ({"function": {"name": "f", "arguments": "{"}}, "function.arguments", "must be a JSON object as text"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "function.arguments", "must be a JSON object as text"),
        ({"function": {"name": "f", "arguments": "[" * 65}}, "function.arguments", "nested more than 64 levels deep"),
        ({"type": "custom", "function": {"name": "f"}}, "type", "must be 'function', got 'custom'"),
    ],
)
def test_invalid_calls_name_their_field(call: Any, field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read({"role": "assistant", "tool_calls": [call]})
    assert caught.value.param == f"messages[0].tool_calls[0].{field}"


def test_only_assistants_call_tools() -> None:
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls needs the role assistant"):
        read({"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]})


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_empty_arguments(arguments: Any) -> None:
    [message] = read({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
