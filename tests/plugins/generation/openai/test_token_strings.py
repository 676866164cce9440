"""The bytes of tokens of byte-level and metaspace vocabularies, and how replies show them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trunkline.plugins.generation.openai.token_strings import (
    chat_token,
    legacy_token,
    show_legacy,
    show_part,
    token_bytes,
    token_name,
)

TEXTS = ["hello world", " hello", "naïve 🙂🙃 中文", "a\n\tb", "é" * 3, "�"]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(request: Any, kind: str, text: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = b"".join(token_bytes(tokenizer, token) for token in ids)
    # Metaspace vocabularies write a space before the first word.
    assert (
        data.decode() == text if kind == "byte_level" or text.startswith(" ") else data.decode() in (text, f" {text}")
    )


def test_every_byte_of_a_byte_level_vocabulary(byte_level: Any) -> None:
    ids = [byte_level.encode(chr(code), add_special_tokens=False) for code in range(1, 256)]
    parts = {token_bytes(byte_level, token) for row in ids for token in row}
    assert {bytes([byte]) for byte in range(1, 0xC0) if byte < 0x80} <= parts
    assert b"".join(token_bytes(byte_level, token) for token in ids[0xFF - 1]) == "ÿ".encode()


def test_special_tokens_have_their_names(byte_level: Any) -> None:
    token = byte_level.convert_tokens_to_ids("<|im_end|>")
    assert token_bytes(byte_level, token) == b"<|im_end|>"


def test_an_id_without_a_token_is_empty(byte_level: Any) -> None:
    assert token_bytes(byte_level, len(byte_level) + 5) == b""


@pytest.mark.parametrize(
    ("data", "part", "legacy"),
    [
        (b"fox", "fox", "fox"),
        ("é".encode(), "é", "é"),
        (b"\xe4\xb8", "\\xe4\\xb8", "bytes:\\xe4\\xb8"),
        (b"a\xff", "\\x61\\xff", "bytes:\\x61\\xff"),
        (b"\\xe4", "\\xe4", "\\xe4"),
        (b"", "", ""),
    ],
)
def test_what_is_shown(data: bytes, part: str, legacy: str) -> None:
    assert (show_part(data), show_legacy(data)) == (part, legacy)
    assert token_name(7) == "token_id:7"


def test_tokens_of_replies(byte_level: Any) -> None:
    [first, *_] = byte_level.encode("Ω", add_special_tokens=False)
    assert chat_token(byte_level, first) == ("\\xce", msgspec.Raw(b"[206]"))
    assert legacy_token(byte_level, first) == "bytes:\\xce"
    for cached in (chat_token, legacy_token):
        assert cached.cache_info().maxsize is not None
