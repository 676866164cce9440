"""Chat templates come with checkpoints and are programs: R-7."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from trunkline.core.errors import RequestError
from trunkline.core.server.api import chat_prompts, chat_templates
from trunkline.core.server.api.chat_prompts import TemplateOptions, render_chat
from trunkline.core.server.api.deadline import TEMPLATE_SECONDS, TookTooLong, deadline

SAID = [{"role": "user", "content": "hello"}]


@pytest.fixture
def tokenizer(zoo: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(zoo("llama"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set _ = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_it_reaches_nothing_and_harms_nothing(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match="chat template refused"):
        render_chat(tokenizer, SAID, "m", TemplateOptions())


def test_it_is_stopped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chat_prompts, chat_templates):
        monkeypatch.setattr(module, "TEMPLATE_SECONDS", 0.2)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match=r"took more than 0\.2 s"):
        render_chat(tokenizer, SAID, "m", TemplateOptions())
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_chat(tokenizer, SAID, "m", TemplateOptions()) == "hello"


def loop(seconds: float) -> None:
    with deadline(seconds):
        while True:
            pass


def test_a_deadline_that_was_met_never_comes() -> None:
    with deadline(0.05):
        pass
    time.sleep(0.15)
    with pytest.raises(TookTooLong):
        loop(0.05)


def prompt_tokens(answer: httpx.Response) -> int:
    told = answer.json()
    return int((told.get("usage") or told["meta_info"])["prompt_tokens"])


@pytest.mark.parametrize(
    "field", ["chat_template", "chat_template_kwargs", "regex", "json_schema", "ebnf", "stop_regex", "response_format"]
)
def test_clients_send_no_programs(http: httpx.Client, field: str) -> None:
    hostile = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}(a+)+$"
    for path, body in (
        ("/v1/chat/completions", {"messages": SAID, "max_tokens": 1, field: hostile}),
        ("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 1, field: hostile}}),
    ):
        began = time.monotonic()
        answer = http.post(path, json=body)
        assert answer.status_code in (200, 400), answer.text
        assert time.monotonic() - began < TEMPLATE_SECONDS
        assert hostile not in answer.text
        if answer.status_code == 200:
            plain = {key: value for key, value in body.items() if key != field}
            assert prompt_tokens(answer) == prompt_tokens(http.post(path, json=plain)), "it changed something"
