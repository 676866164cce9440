"""Formats are chosen by the chat template, the checkpoint or the flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.errors import ConfigError
from trunkline.plugins.generation.formats.choose import check_names, reply_format
from trunkline.plugins.generation.formats.reasoning_formats import REASONING_FORMATS
from trunkline.plugins.generation.formats.regions import Regions
from trunkline.plugins.generation.formats.templates import TOOL_FORMATS


class _Tokenizer:
    def __init__(self, template: dict[str, Any] | None = None) -> None:
        self.response_template = template


def _chosen(template: str, tool: str = "auto", reasoning: str = "auto", own: dict[str, Any] | None = None) -> Any:
    tokenizer: Any = _Tokenizer(own)
    return reply_format(tokenizer, template, tool, reasoning)


@pytest.mark.parametrize(
    ("template", "tool", "fields"),
    [
        ("<|im_start|>{{ m }}", None, set()),
        ('{{ tools }}<tool_call>\n{"name": <function-name>}</tool_call>', "hermes", {"tool_calls", "content"}),
        ("<tool_call>…</tool_call>{% if '</think>' in content %}<think>", "hermes", {"reasoning_content"}),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder", {"tool_calls"}),
        ("<tool_call>{{ name }}\n<arg_key>k</arg_key> <think>", "glm45", {"reasoning_content"}),
        ("{{ '[TOOL_CALLS]' }} [AVAILABLE_TOOLS]", "mistral_v3", {"tool_calls", "tool_calls_array"}),
        ("[TOOL_CALLS]{{ name }}[ARGS] [THINK]", "mistral", {"reasoning_content"}),
        (
            "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\n' + '```json'",
            "deepseekv3",
            {"tool_calls"},
        ),
        ("'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + arguments", "deepseekv31", {"tool_calls"}),
        ('{"name": function name, "parameters": dictionary of argument name', "llama3", {"tool_calls"}),
        (
            "<|start|>assistant<|channel|>analysis<|message|> <|constrain|>",
            "gpt-oss",
            {"reasoning_content", "tool_calls"},
        ),
        ("<|tool_call>call: <|channel>thought", "gemma4", {"reasoning_content", "tool_calls"}),
        ("<start_function_call>call:", "functiongemma", {"tool_calls"}),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", {"tool_calls"}),
    ],
)
def test_by_the_chat_template(template: str, tool: str | None, fields: set[str]) -> None:
    form = _chosen(template)
    assert form.tool == (None if tool is None else TOOL_FORMATS[tool])
    found = form.template(tools=True, reasoning=True)
    assert (set() if found is None else fields & found["fields"].keys()) == fields


def test_flags_override_the_chat_template() -> None:
    template = "<tool_call></tool_call><think>"
    assert _chosen(template, "mistral").tool == TOOL_FORMATS["mistral"]
    assert _chosen(template, "none").tool is None
    assert _chosen(template, reasoning="none").reasoning is None
    assert _chosen("", "qwen25", "deepseek_r1").thoughts.begins_open == "<think>"


def test_what_a_request_doesn_t_want_isn_t_parsed() -> None:
    form = _chosen("<tool_call></tool_call><think>")
    assert form.template(tools=False, reasoning=False) is None
    assert form.template(tools=False, reasoning=True)["fields"].keys() == {"reasoning_content", "content"}
    assert form.template(tools=True, reasoning=False)["fields"].keys() == {"content", "tool_calls"}


def test_the_checkpoint_s_template_comes_first() -> None:
    own = {"start_anchor": "A:", "fields": {"thinking": {"open": "(", "close": ")"}, "content": {}}}
    form = _chosen("<tool_call>", own=own)
    assert form.own
    assert form.reasoning == own
    assert form.calls is None
    assert not _chosen("<tool_call>", "hermes", own=own).own


def test_unknown_names_stop_the_start() -> None:
    check_names("auto", "none")
    with pytest.raises(ConfigError, match="--tool-call-parser 'x' is unknown; use auto, none or one of gpt-oss"):
        check_names("x", "auto")
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        check_names("auto", "hermes")


def test_names_are_unique_and_templates_load() -> None:
    for formats in (TOOL_FORMATS, REASONING_FORMATS):
        names = [name for key, one in formats.items() for name in (key, *one.aliases)]
        assert len(set(names)) == len(names)
    for tool in TOOL_FORMATS:
        for reasoning in REASONING_FORMATS:
            Regions(_chosen("", tool, reasoning).template(tools=True, reasoning=True))


def test_an_invalid_template_of_a_checkpoint_names_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"response_template is invalid: .*unknown content parser 'yaml'"):
        Regions({"start_anchor": "A", "fields": {"content": {"content": "yaml"}}})


def test_the_page_lists_all_names(repository: Path) -> None:
    page = (repository / "docs" / "tools.md").read_text()
    rows = [re.findall("`([^`]*)`", line.rsplit("|", 2)[0]) for line in page.splitlines() if line.startswith("| `")]
    for formats in (TOOL_FORMATS, REASONING_FORMATS):
        for key, one in formats.items():
            assert [key, *one.aliases] in rows
