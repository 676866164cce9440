"""Grammar engines of other plugins, chosen by --grammar-backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trunkline.core.discovery import Plugin, find
from trunkline.core.errors import ConfigError, RequestError
from trunkline.core.hookspecs import hookimpl
from trunkline.core.host import Host
from trunkline.plugins.generation.schemas import Grammar


class Matcher:
    """Repeats one letter; "x" makes it fail at the third token in the way that ``text`` names."""

    def __init__(self, token: int, text: str) -> None:
        self.token, self.text, self.count = token, text, 0

    def fill(self, mask: np.ndarray) -> None:
        words = mask.view(np.uint32)
        words[:] = 0
        words[self.token // 32] |= 1 << self.token % 32

    def accept(self, token: int) -> None:
        assert token == self.token
        self.count += 1
        if self.count == 3 and self.text == "limit":
            raise ValueError("three are enough")
        if self.count == 3 and self.text == "defect":
            raise SystemExit(3)

    @property
    def finished(self) -> bool:
        return self.count == 5


class Repeat:
    name = "repeat"

    def __init__(self, token: int) -> None:
        self.token = token

    def compile(self, grammar: Grammar) -> Any:
        if grammar.kind != "regex":
            raise ValueError("only regex")
        compiled = ModuleType("compiled")
        compiled.nbytes = 10  # type: ignore[attr-defined]
        compiled.matcher = lambda: Matcher(self.token, grammar.text)  # type: ignore[attr-defined]
        return compiled


@pytest.fixture
def host() -> Host:
    plugin = ModuleType("repeating_plugin")

    def hook(model: Any) -> list[Any]:
        return [Repeat(model.tokenizer.encode("q", add_special_tokens=False)[0])]

    plugin.hook = hookimpl(specname="trunkline_grammar_engines")(hook)  # type: ignore[attr-defined]
    return Host([*find(), Plugin("repeating", "repeating_plugin", module=plugin)])


def test_an_engine_of_another_plugin(
    host: Host, recorded_engine: Callable[..., Any], zoo: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = recorded_engine(zoo("llama"), host=host, grammar_backend="repeat")
    record = engine(text="x", sampling_params={"regex": "anything"})[0]
    assert record["text"] == "qqqqq"
    assert record["meta_info"]["finish_reason"]["type"] == "stop"
    with pytest.raises(RequestError, match="Failed to compile ebnf grammar: only regex"):
        engine(text="x", sampling_params={"ebnf": "root ::= x"})
    with pytest.raises(RequestError, match="The regex grammar can't be followed any further: three are enough"):
        engine(text="x", sampling_params={"regex": "limit"})
    with pytest.raises(RequestError, match="The grammar engine failed") as caught:
        engine(text="x", sampling_params={"regex": "defect"})
    assert caught.value.status == 500
    assert "a grammar engine's matcher raised SystemExit" in caplog.text
    assert engine(text="x", sampling_params={"regex": "again"})[0]["text"] == "qqqqq"


def test_the_own_engine_is_the_default(
    host: Host, recorded_engine: Callable[..., Any], zoo: Callable[[str], Path]
) -> None:
    engine = recorded_engine(zoo("llama"), host=host)
    assert engine(text="x", sampling_params={"regex": "ab"})[0]["text"] == "ab"


def test_none_refuses_grammars(recorded_engine: Callable[..., Any], zoo: Callable[[str], Path]) -> None:
    engine = recorded_engine(zoo("llama"), grammar_backend="none")
    with pytest.raises(RequestError, match=r"ebnf is switched off on this server \(--grammar-backend none\)"):
        engine(text="x", sampling_params={"ebnf": "root ::= x"})


def test_a_model_without_tokenizer(recorded_engine: Callable[..., Any], zoo: Callable[[str], Path]) -> None:
    engine = recorded_engine(zoo("llama"), skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="regex needs a tokenizer, and this model has none; leave it out"):
        engine(input_ids=[5], sampling_params={"regex": "x"})


def test_an_unknown_name_stops_the_start(recorded_engine: Callable[..., Any], zoo: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="choose one of auto, none, llguidance"):
        recorded_engine(zoo("llama"), grammar_backend="xgrammar")
