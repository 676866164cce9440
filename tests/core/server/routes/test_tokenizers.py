"""Tokenising over HTTP: a tokenizer of one token a letter behind a real port, and a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from litestar import Litestar, Request

from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import dialect_of, error_response
from trunkline.core.server.routes.tokenizers import tokenizer_routes

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def letters(live: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    _, port = await live()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        yield http


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_tokenize(letters: httpx.AsyncClient, path: str) -> None:
    one = await letters.post(path, json={"prompt": "ab"})
    assert one.json() == {"tokens": [1, 97, 98], "count": 3, "max_model_len": 512}
    bare = await letters.post(path, json={"prompt": "ab", "add_special_tokens": False, "model": "anything"})
    assert bare.json()["tokens"] == [97, 98]
    several = await letters.post(path, json={"prompt": ["a", "bc", ""]})
    assert several.json() == {"tokens": [[1, 97], [1, 98, 99], [1]], "count": [2, 3, 1], "max_model_len": 512}
    assert (await letters.post(path, json={"prompt": []})).json()["count"] == []


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_detokenize(letters: httpx.AsyncClient, path: str) -> None:
    assert (await letters.post(path, json={"tokens": [97, 98]})).json() == {"text": "ab", "prompt": "ab"}
    several = await letters.post(path, json={"tokens": [[97], [98, 99], []]})
    assert several.json() == {"text": ["a", "bc", ""], "prompt": ["a", "bc", ""]}
    assert (await letters.post(path, json={"tokens": []})).json() == {"text": "", "prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "Exactly one of 'prompt' or 'messages' must be provided."),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "Exactly one of 'prompt' or 'messages' must be provided."),
        ("/tokenize", {"messages": CHAT}, "m has no chat template; send a text prompt"),
        ("/tokenize", {"messages": []}, "Messages cannot be empty."),
        ("/tokenize", {"messages": CHAT, "tools": [{}]}, "tools is not supported yet"),
        ("/tokenize", {"prompt": 5}, ""),
        ("/tokenize", {"prompt": "a" * 500_000}, "The input (500000 characters) is longer than"),
        ("/detokenize", {"tokens": [1000]}, "The tokens contains values greater than the vocab size (1000): 1000."),
        ("/detokenize", {"tokens": [-1]}, "The tokens contains a negative value: -1."),
        ("/detokenize", {"tokens": [[1], [-1]]}, "tokens[1]: The tokens contains a negative value: -1."),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens mixes ids and lists of ids."),
        ("/detokenize", {"tokens": "ab"}, ""),
        ("/detokenize", {"tokens": ["x"]}, ""),
        ("/detokenize", {}, ""),
    ],
)
async def test_bad_requests(letters: httpx.AsyncClient, path: str, body: dict[str, Any], message: str) -> None:
    answer = await letters.post(path, json=body)
    assert answer.status_code == 400
    assert (answer.json()["object"], answer.json()["code"]) == ("error", 400)
    assert answer.json()["message"].startswith(message)


async def test_an_unknown_model_of_several_is_404(live: Callable[..., Any]) -> None:
    _, port = await live({"model_path": "one"}, {"model_path": "two"})
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        assert (await http.post("/tokenize", json={"prompt": "a", "model": "two"})).status_code == 200
        assert (await http.post("/tokenize", json={"prompt": "a", "model": "three"})).status_code == 404


@pytest.fixture
async def real(zoo: Callable[[str], Path]) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """The routes over a real tokenizer, and that."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(zoo("llama"))

    async def off_loop(function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return function(*args)

    async def tokenize(model: str, texts: list[str], *, special: bool, limit: int) -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=special) for text in texts]

    served = SimpleNamespace(
        name="tiny",
        aliases=(),
        skip_tokenizer_init=False,
        info=SimpleNamespace(context_length=512, vocab_size=len(tokenizer)),
    )
    engine: Any = SimpleNamespace(
        models=[served], tokenizer=lambda name: tokenizer, off_loop=off_loop, tokenize=tokenize
    )

    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error, dialect_of(request))

    app = Litestar([*tokenizer_routes(engine)], exception_handlers={RequestError: refuse})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        yield http, tokenizer


async def test_messages_are_tokenised_as_chats_are(real: tuple[httpx.AsyncClient, Any]) -> None:
    http, tokenizer = real

    async def tokens(**body: Any) -> list[int]:
        answer = await http.post("/tokenize", json={"messages": CHAT} | body)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["tokens"]
        return ids

    def rendered(special: bool = False, **options: Any) -> list[int]:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        return ids

    usual = rendered(add_generation_prompt=True)
    assert await tokens() == usual
    assert await tokens(add_special_tokens=True) == usual, "rendered as a chat, it has the template's only"
    assert await tokens(add_generation_prompt=False) == rendered(add_generation_prompt=False)
    with_bos = rendered(special=True, add_generation_prompt=True)
    assert await tokens(add_generation_prompt=True, add_special_tokens=True) == with_bos
    assert await tokens(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]) == usual
    for body, message in (
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string or a list of text parts."),
        ({"messages": [{"content": "a"}]}, "messages[0].role must be a non-empty string."),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs can't set tokenize"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message and add_generation"),
    ):
        answer = await http.post("/tokenize", json={"messages": CHAT} | body)
        assert answer.status_code == 400
        assert answer.json()["message"].startswith(message)


async def test_text_survives_the_way_there_and_back(real: tuple[httpx.AsyncClient, Any]) -> None:
    http, tokenizer = real
    text = "hello there"
    ids = (await http.post("/tokenize", json={"prompt": text})).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert (await http.post("/detokenize", json={"tokens": ids})).json()["text"] == tokenizer.decode(
        ids, skip_special_tokens=True
    )
    shown = await http.post("/detokenize", json={"tokens": ids, "skip_special_tokens": False})
    assert shown.json()["text"] == tokenizer.decode(ids)


async def test_tokenizer_info_suffices_for_lm_eval(real: tuple[httpx.AsyncClient, Any]) -> None:
    http, tokenizer = real
    info = (await http.get("/tokenizer_info")).json()
    assert info["eos_token"] == tokenizer.eos_token
    assert info["bos_token"] == tokenizer.bos_token
    assert info["chat_template"] == tokenizer.chat_template
    assert info["tokenizer_class"] == type(tokenizer).__name__
    assert info["model_max_length"] == 512
    eos = await http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False})
    assert eos.json()["tokens"] == [tokenizer.eos_token_id]
