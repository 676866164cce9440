"""The tokenizer of a checkpoint, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from ..types import ModelSource, Tokenizer

# One of these makes a folder one with a tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def load(source: ModelSource) -> Tokenizer | None:
    """The tokenizer in ``source.path``, None when there is none. ModelError when it is broken."""
    folder = Path(source.path)
    if not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise whatever comes up
        raise ModelError(f"The tokenizer in {folder} can't be loaded: {error}") from error
    return tokenizer
