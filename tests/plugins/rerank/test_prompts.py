"""Prompts fall apart into what stays and the document, and together they are what the tokenizer makes of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trunkline.core.errors import RequestError
from trunkline.core.types import ModelInfo, ServedModel
from trunkline.plugins.rerank.prompts import JudgePrompter, PairPrompter, Prompt, split_prompts
from trunkline.plugins.rerank.reranker import Limits, Reranker, check_room, fit_prompt
from trunkline.plugins.rerank.routes import _of_v1
from trunkline.plugins.rerank.settings import RerankSettings

ROLES = (
    "<|im_start|>system\n{{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first "
    "| default('Judge.') }}<|im_end|>\n"
    "<Q>{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
    "<D>{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>"
)


@pytest.fixture(scope="session")
def qwen(reranker: Callable[[str], Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(reranker("qwen3-reranker"))


@pytest.fixture
def roles(reranker: Callable[[str], Path]) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(reranker("qwen3-reranker"))
    tokenizer.chat_template = ROLES
    return tokenizer


def text_of(tokenizer: Any, prompt: Prompt) -> str:
    return str(tokenizer.decode(prompt.head + prompt.document + prompt.tail))


def test_templates_with_roles(roles: Any) -> None:
    prompter = JudgePrompter(roles)
    [plain] = prompter(["who?"], ["me"], None)
    assert text_of(roles, plain) == "<|im_start|>system\nJudge.<|im_end|>\n<Q>who?<D>me<|im_end|>"
    [told] = prompter(["who?"], ["me"], "Be kind.")
    assert text_of(roles, told) == "<|im_start|>system\nBe kind.<|im_end|>\n<Q>who?<D>me<|im_end|>"
    assert roles.decode(told.document) == "me"
    assert prompter.takes_instruct
    [default] = JudgePrompter(roles, "By default.")(["who?"], ["me"], None)
    assert "By default." in text_of(roles, default)


def test_a_template_without_place_for_an_instruction(roles: Any) -> None:
    roles.chat_template = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}/" + (
        "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    )
    assert not JudgePrompter(roles).takes_instruct


@pytest.mark.field
def test_templates_that_go_through_parts_of_content(roles: Any) -> None:
    """The query and the document are there, as in the same template for strings."""
    texts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    roles.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + texts + "<|im_end|>\n{% endfor %}"
    [parts] = JudgePrompter(roles)(["who?"], ["me"], None)
    roles.chat_template = roles.chat_template.replace(texts, "{{ m.content }}")
    [strings] = JudgePrompter(roles)(["who?"], ["me"], None)
    assert parts == strings
    assert "<Query>: who?\n<Document>: me" in text_of(roles, parts)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no roles here') }}", "can't be used for reranking: no roles here"),
        ("always the same", "leaves out the query or the document"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out"),
    ],
)
def test_templates_that_can_t_hold_a_pair(roles: Any, template: str, message: str) -> None:
    roles.chat_template = template
    with pytest.raises(RequestError, match=message):
        JudgePrompter(roles)


def test_texts_are_never_taken_for_places(qwen: Any) -> None:
    [prompt] = JudgePrompter(qwen)(["⟦document⟧ {{ x }}"], ["⟦query⟧"], "⟦query⟧")
    assert "<Instruct>: ⟦query⟧\n<Query>: ⟦document⟧ {{ x }}\n<Document>: ⟦query⟧<|im_end|>" in text_of(qwen, prompt)


@given(query=st.text(min_size=1, max_size=20), document=st.text(max_size=20))
def test_a_judge_s_prompt_is_the_whole_s_tokens(qwen: Any, query: str, document: str) -> None:
    prompter = JudgePrompter(qwen)
    [prompt] = prompter([query], [document], None)
    [empty] = prompter([query], [""], None)
    whole = text_of(qwen, empty)
    at = whole.rindex("<Document>: ") + len("<Document>: ")
    ids = qwen.encode(whole[:at] + document + whole[at:], add_special_tokens=False)
    assert prompt.head + prompt.document + prompt.tail == ids
    assert qwen.decode(prompt.document).strip() == document.strip() or not document.isprintable()
    assert empty.document == [] or qwen.decode(empty.document).strip() == ""


@pytest.mark.parametrize(("name", "types"), [("bert", True), ("roberta", False)])
def test_pairs_as_the_tokenizer_joins_them(name: str, types: bool, reranker: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reranker(name))
    queries, documents = ["what is it", "the city"], ["paris in france", "gravity"]
    for prompt, query, document in zip(
        PairPrompter(tokenizer)(queries, documents, None), queries, documents, strict=True
    ):
        whole = tokenizer(query, document)
        assert prompt.head + prompt.document + prompt.tail == whole["input_ids"]
        assert prompt.document == tokenizer.encode(document, add_special_tokens=False)
        assert len(prompt.tail) == 1
        assert prompt.second_at == (whole["token_type_ids"].index(1) if types else None)


def test_a_document_without_tokens(reranker: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reranker("bert"))
    [prompt] = PairPrompter(tokenizer)(["paris"], ["\u200b\u0300"], None)
    assert prompt.head + prompt.document + prompt.tail == tokenizer("paris", "\u200b\u0300")["input_ids"]
    assert prompt.document == []


@pytest.mark.parametrize("item_first", [False, True])
def test_special_tokens_stay_outside_the_document(item_first: bool, reranker: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reranker("roberta"))
    heads, tails = ([""], ["query"]) if item_first else (["query"], [""])
    [prompt] = split_prompts(tokenizer, heads, ["document"], tails, special=True)
    text = heads[0] + "document" + tails[0]
    assert prompt.head + prompt.document + prompt.tail == tokenizer.encode(text)
    assert tokenizer.decode(prompt.document) == "document"


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(RequestError, match="fast tokenizer"):
        split_prompts(SimpleNamespace(is_fast=False), [""], ["a"], [""], special=True)


# -- lengths ---------------------------------------------------------------------------------

PROMPT = Prompt([1, 2], list(range(10, 20)), [3], 2)


def lengths(**limits: Any) -> tuple[list[list[int]], list[int]]:
    check_room(PROMPT, Limits(**limits))
    items = fit_prompt(PROMPT, Limits(**limits))
    assert all(item.second_at == 2 for item in items)
    assert all(item.ids[:2] == [1, 2] and item.ids[-1] == 3 for item in items)
    return [item.ids[2:-1] for item in items], [item.whole for item in items]


@pytest.mark.parametrize(
    ("limits", "documents", "whole"),
    [
        ({"prompt": 13}, [PROMPT.document], 0),
        ({"prompt": 7, "how": "end"}, [[10, 11, 12, 13]], 13),
        ({"prompt": 7, "how": "start"}, [[16, 17, 18, 19]], 13),
        ({"prompt": 100, "document": 3}, [[10, 11, 12]], 13),
        ({"prompt": 100, "document": 3, "how": "start"}, [[17, 18, 19]], 13),
        ({"prompt": 100, "document": 10}, [PROMPT.document], 0),
        ({"prompt": 7, "document": 3}, [[10, 11, 12]], 13),
        ({"prompt": 8, "chunks": 2}, [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]], 0),
        ({"prompt": 7, "chunks": 3}, [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]], 0),
        ({"prompt": 7, "chunks": 2}, [[10, 11, 12, 13], [14, 15, 16, 17]], 13),
        ({"prompt": 13, "chunks": 4}, [PROMPT.document], 0),
    ],
)
def test_what_is_kept(limits: dict[str, Any], documents: list[list[int]], whole: int) -> None:
    assert lengths(**limits) == (documents, [whole] * len(documents))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"prompt": 12}, r"The input \(13 tokens\) is longer than the model's context length \(12 tokens\)"),
        ({"prompt": 7, "document": 5}, r"The input \(8 tokens\) is longer"),
        ({"prompt": 3, "how": "end"}, r"The query leaves no room for a document: .* takes 3 tokens"),
        ({"prompt": 2, "chunks": 3}, r"leaves no room"),
    ],
)
def test_what_can_t_be_kept(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lengths(**limits)


# -- models ----------------------------------------------------------------------------------


def served(path: Path, architecture: str = "Qwen3ForCausalLM") -> ServedModel:
    info = ModelInfo(
        path=str(path),
        architecture=architecture,
        model_type="",
        context_length=64,
        vocab_size=300,
        hidden_size=8,
        causal=architecture.startswith("Qwen3"),
    )
    return ServedModel(
        name="it",
        model_path=str(path),
        tokenizer_path=str(path),
        info=info,
        tasks={"rerank": False},
        max_total_tokens=64,
        max_running_requests=1,
        dtype="float32",
        attention_backend="cpu",
    )


def test_answer_tokens_are_found(qwen: Any, tmp_path: Path) -> None:
    words = tuple(qwen.convert_tokens_to_ids(["yes", "no"]))
    assert Reranker(served(tmp_path), qwen, RerankSettings()).params.labels == words
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "LogitScore", "path": "score"}]))
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "config.json").write_text(json.dumps({"true_token_id": 9, "false_token_id": None}))
    assert Reranker(served(tmp_path), qwen, RerankSettings()).params.labels == (9,)


def test_models_that_can_t_be_asked(qwen: Any, reranker: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no tokenizer"):
        Reranker(served(tmp_path), None, RerankSettings())
    mute = AutoTokenizer.from_pretrained(reranker("bert"))
    with pytest.raises(RequestError, match="no single tokens for yes and no"):
        _ = Reranker(served(tmp_path), mute, RerankSettings()).params
    with pytest.raises(RequestError, match="has no chat template"):
        _ = Reranker(served(tmp_path), mute, RerankSettings()).prompter
    pair = Reranker(served(tmp_path), mute, RerankSettings(rerank_prompt="pair"))
    assert isinstance(pair.prompter, PairPrompter)
    encoder = Reranker(served(tmp_path, "BertForSequenceClassification"), mute, RerankSettings(rerank_prompt="judge"))
    assert isinstance(encoder.prompter, PairPrompter), "the setting is for causal models"


@pytest.mark.parametrize(
    ("headers", "fields", "setting", "dialect"),
    [
        ({}, {}, "sglang", "sglang"),
        ({}, {}, "jina", "jina"),
        ({"x-fern-sdk-name": "cohere"}, {}, "sglang", "cohere"),
        ({"user-agent": "cohere/5.1"}, {}, "jina", "cohere"),
        ({"user-agent": "my-cohere/5.1"}, {}, "sglang", "sglang"),
        ({"user-agent": "cohere-ai/8.1.0"}, {}, "sglang", "cohere"),
        ({"x-fern-sdk-name": "cohere-ai"}, {}, "jina", "cohere"),
        ({"user-agent": "litellm/1.110.2"}, {}, "sglang", "jina"),
        ({"user-agent": "litellm/1.110.2"}, {}, "tei", "jina"),
        ({"user-agent": "litellm/1.110.2"}, {}, "cohere", "cohere"),
        ({"user-agent": "litellm/1.110.2"}, {"rank_fields": ["a"]}, "sglang", "cohere"),
        ({}, {"rank_fields": ["a"]}, "sglang", "cohere"),
        ({}, {"max_chunks_per_doc": 3}, "sglang", "cohere"),
    ],
)
def test_cohere_s_v1_client_is_recognised(
    headers: dict[str, str], fields: dict[str, Any], setting: str, dialect: str
) -> None:
    own = SimpleNamespace(settings=RerankSettings(rerank_format=setting))  # type: ignore[arg-type]
    service: Any = SimpleNamespace(reranker=lambda model: own)
    body: Any = SimpleNamespace(**{"model": None, "rank_fields": None, "max_chunks_per_doc": None, **fields})
    request: Any = SimpleNamespace(headers=headers)
    assert _of_v1(service, request, body) == dialect
