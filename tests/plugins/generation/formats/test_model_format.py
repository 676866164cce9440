"""What a served model's format needs of its tokenizer, and what is left without a usable template."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.formats.model_format import ModelFormat

TEMPLATE = "[TOOL_CALLS] [THINK] <tool>"


def _tokenizer(template: dict[str, Any] | None = None, chat_template: Any = TEMPLATE) -> Any:
    tokens = ["<s>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[INST]"]
    added = {7 + index: SimpleNamespace(content=token, special=True) for index, token in enumerate(tokens)}
    added[99] = SimpleNamespace(content="[CALL_ID]", special=False)
    return SimpleNamespace(response_template=template, chat_template=chat_template, added_tokens_decoder=added)


def test_the_markers_among_the_special_tokens_are_kept() -> None:
    model = ModelFormat(_tokenizer(), "auto", "auto")
    for tools, kept in ((True, {8, 9, 10, 11}), (False, {10, 11})):
        regions = model.regions(tools, True)
        assert regions is not None
        assert model.kept(regions) == kept


def test_a_template_for_tools_counts() -> None:
    model = ModelFormat(_tokenizer(chat_template={"default": "", "tool_use": "<tool_call>"}), "auto", "auto")
    assert model.form.tool is not None
    model.check_tools()


def test_an_invalid_template_of_the_checkpoint_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    own = {"start_anchor": "A", "fields": {"tool_calls": {"open": "<", "content": "yaml"}, "thinking": {"open": "("}}}
    model = ModelFormat(_tokenizer(own), "auto", "auto")
    assert model.regions(True, True) is None
    assert "replies are sent as they are: The model's response_template is invalid" in caplog.text
    with pytest.raises(RequestError, match=r"Tool calls can't be read\. .*unknown content parser 'yaml'"):
        model.check_tools()


def test_a_transformers_without_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.chat_parsing.response_templates", None)
    model = ModelFormat(_tokenizer(), "auto", "auto")
    assert model.regions(False, True) is None
    with pytest.raises(RequestError, match=r"need transformers >= 5\.17") as caught:
        model.check_tools()
    assert caught.value.param == "tools"
