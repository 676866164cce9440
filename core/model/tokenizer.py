"""The tokenizer of a checkpoint, by transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ModelError
from .folder import check_folder

if TYPE_CHECKING:
    from ..types import ModelSource, Tokenizer

# One of these makes a folder one with a tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def import_without_torch() -> None:
    """Import transformers for its tokenizers only, unless torch is there already.

    Wherever torch is installed its tokenizers import it too, which takes seconds and 200 MB, though
    they do all their work without. transformers looks for torch once, when it is imported.
    """
    if "torch" in sys.modules:
        return
    advice = logging.getLogger("transformers")
    advice.disabled = True  # it would warn that models can't be loaded
    sys.modules["torch"] = None  # type: ignore[assignment]  # not to be found
    try:
        import transformers  # noqa: F401
    finally:
        del sys.modules["torch"]
        advice.disabled = False


def load(source: ModelSource) -> Tokenizer | None:
    """The tokenizer in ``source.path``, None when there is none. ModelError when it is broken."""
    folder = Path(source.path)
    if not any((folder / name).is_file() for name in FILES):
        return None
    check_folder(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever comes up
        raise ModelError(f"The tokenizer in {folder} can't be loaded: {error}") from error
    return tokenizer


def public_path(typed: str, source: ModelSource) -> str:
    """The path or id by which other programs can load the tokenizer.

    What the user typed, or the folder where only this server's plugins know what that means (``demo:NAME``; hub
    ids have no colon).
    """
    return typed if ":" not in typed or Path(typed).expanduser().is_dir() else source.path


def token_ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Ids of a text, with the special tokens that the tokenizer adds if ``special``.

    What ``tokenizer.encode`` gives; where it is one of the tokenizers library in three quarters of
    its time, because nobody needs to know where in the text a token stood.
    """
    backend = _backend(cast("Hashable", tokenizer))
    if backend is None:
        return tokenizer.encode(text, add_special_tokens=special)
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return ids


@lru_cache(maxsize=64)  # more models than one server has
def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokenizer.encode("a")  # transformers hands its settings over when it is called: no truncation, no padding
    return backend
