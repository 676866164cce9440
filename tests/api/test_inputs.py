"""Other inputs than text on a live server: embeddings, and ids only with ``--skip-tokenizer-init``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def test_the_embeddings_of_ids_are_answered_as_the_ids(http: httpx.Client, checkpoint: Path) -> None:
    table = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    ids = list(range(40, 70))
    expected = http.post("/generate", json={"input_ids": ids, "sampling_params": GREEDY}).json()
    body: dict[str, Any] = {"input_embeds": table[ids].tolist(), "sampling_params": GREEDY}
    first, second = (http.post("/generate", json=body).json() for _ in range(2))
    assert first["output_ids"] == second["output_ids"] == expected["output_ids"]
    assert first["meta_info"]["cached_tokens"] == 0, "ids and embeddings share no prefix"
    assert second["meta_info"]["cached_tokens"] == len(ids) - 1
    samples = http.post("/generate", json=body | {"sampling_params": GREEDY | {"n": 3}}).json()
    assert [record["output_ids"] for record in samples] == [expected["output_ids"]] * 3
    short = http.post("/generate", json={"input_embeds": [[0.5] * 3], "sampling_params": GREEDY})
    assert short.status_code == 400
    assert short.json()["error"]["message"] == f"input_embeds have 3 components each; embeddings of tiny have {128}."


def test_a_body_of_too_many_numbers_names_the_flag(http: httpx.Client) -> None:
    content = b'{"input_embeds": [' + b",".join([b"[" + b"0," * 4095 + b"0]"] * 257) + b"]}"
    answer = http.post("/generate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "--max-body-bytes" in answer.json()["message"]


@pytest.fixture(scope="module")
def tokenless(live: Callable[..., Any], zoo: Callable[[str], Path]) -> Iterator[httpx.Client]:
    server = live(str(zoo("llama")), "--skip-tokenizer-init")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_without_a_tokenizer_replies_are_ids(tokenless: httpx.Client, http: httpx.Client) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": GREEDY}
    record = tokenless.post("/generate", json=body).json()
    assert "text" not in record
    assert record["output_ids"] == http.post("/generate", json=body).json()["output_ids"]
    refused = tokenless.post("/generate", json={"text": "hello"})
    assert refused.json()["error"]["message"] == (
        "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please provide input_ids or "
        "re-initialize the engine with skip_tokenizer_init=False."
    )
    chat = tokenless.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
    assert chat.status_code == 400
    assert tokenless.post("/v1/completions", json={"prompt": [5]}).status_code == 400
    assert tokenless.get("/health_generate").status_code == 200
    for path, asked in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]}), ("/tokenizer_info", None)):
        answer = tokenless.post(path, json=asked) if asked else tokenless.get(path)
        assert answer.status_code == 400
        assert "has no tokenizer: --skip-tokenizer-init is set" in answer.text
