"""The bytes of single tokens, and how OpenAI's replies show those that aren't text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec

from trunkline.plugins.generation.text.detokenizer import REPLACEMENT

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte in vocabularies that have others for text
CONTEXT = "a"  # decoders strip a space from the first token of a call


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """UTF-8 of a token's text; a part of a character if the token is one. Special tokens have their names."""
    text = _text_in_context(tokenizer, token)
    if REPLACEMENT not in text:
        return text.encode(errors="replace")
    piece = tokenizer.convert_ids_to_tokens(token)
    if match := BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    values = _byte_values()
    if all(character in values for character in piece):
        return bytes(values[character] for character in piece)
    return text.encode()


@lru_cache(maxsize=1 << 16)
def chat_token(tokenizer: Any, token: int) -> tuple[str, msgspec.Raw]:
    """A token as a chat's log-probabilities show it: its text, and its bytes as a JSON array."""
    data = token_bytes(tokenizer, token)
    return show_part(data), msgspec.Raw(msgspec.json.encode(list(data)))


@lru_cache(maxsize=1 << 16)
def legacy_token(tokenizer: Any, token: int) -> str:
    """A token as the log-probabilities of ``/v1/completions`` show it."""
    return show_legacy(token_bytes(tokenizer, token))


def show_part(data: bytes) -> str:
    """A token as text. Bytes that are no whole characters are shown as escapes, ``\\xe4\\xb8``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def show_legacy(data: bytes) -> str:
    """The same for ``/v1/completions``, which marks such tokens: ``bytes:\\xe4\\xb8``."""
    text = show_part(data)
    return text if text.encode(errors="replace") == data else f"bytes:{text}"


def token_name(token: int) -> str:
    """vLLM's unambiguous name of a token (``return_tokens_as_token_ids``)."""
    return f"token_id:{token}"


def _text_in_context(tokenizer: Any, token: int) -> str:
    """The text of a token that isn't the first one."""
    ids, before = _context(tokenizer)
    decoded = str(tokenizer.decode([*ids, token], skip_special_tokens=False))
    if decoded.startswith(before):
        return decoded[len(before) :]
    return str(tokenizer.decode([token], skip_special_tokens=False))


@lru_cache(maxsize=64)  # more models than one server has
def _context(tokenizer: Any) -> tuple[list[int], str]:
    ids = tokenizer.encode(CONTEXT, add_special_tokens=False)
    return ids, str(tokenizer.decode(ids, skip_special_tokens=False))


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves; the other bytes have the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    values = {chr(byte): byte for byte in printable}
    return values | {chr(256 + index): byte for index, byte in enumerate(others)}
