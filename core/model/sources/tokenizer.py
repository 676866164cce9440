"""Loads the tokenizer of a checkpoint through transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trunkline.core.errors import ModelError

from .folder import check_folder

if TYPE_CHECKING:
    from trunkline.core.types import ModelSource, Tokenizer

# A folder with a file of one of these names has a tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab.json", "vocab.txt", "*.model")
# With one of these, transformers doesn't read the folder's *.model file.
COMPLETE = ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt")


def import_without_torch() -> None:
    """Import transformers without torch, for its tokenizers only. Does nothing if torch is imported already.

    If torch is installed, transformers imports it, too, which takes seconds and 200 MB, but tokenizers don't need it.
    transformers checks for torch only once, when it is imported.
    """
    if "torch" in sys.modules:
        return
    advice = logging.getLogger("transformers")
    advice.disabled = True  # suppresses the warning that models can't be loaded
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        import transformers  # noqa: F401
    finally:
        del sys.modules["torch"]
        advice.disabled = False


def load(source: ModelSource) -> Tokenizer | None:
    """The tokenizer in ``source.path``, None when there is none.

    Raises ModelError when it is damaged, or when a package that is needed to read it isn't installed.
    """
    folder = Path(source.path)
    if not _has_file(folder, FILES):
        return None
    check_folder(folder)
    if not _has_file(folder, COMPLETE) and (models := sorted(folder.glob("*.model"))):
        _check_vocabulary(models[0])
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise various exceptions
        reason = " ".join(str(error).split())
        raise ModelError(f"The tokenizer in {folder} can't be loaded: {reason}") from error
    return tokenizer


def _has_file(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _check_vocabulary(path: Path) -> None:
    """ModelError when a SentencePiece or tiktoken vocabulary is damaged, or the package to read it is missing.

    transformers tries tiktoken for every file that it can't read as SentencePiece, so its error may name the wrong
    package.
    """
    from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

    if _is_tiktoken(path):
        kind, needed = "tiktoken", {"tiktoken": is_tiktoken_available()}
    else:
        kind = "SentencePiece"
        needed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    if missing := [package for package, available in needed.items() if not available]:
        raise ModelError(
            f"{path} is a {kind} vocabulary, and to read it the package {' and '.join(missing)} must be installed: "
            f"pip install {' '.join(missing)}. A tokenizer.json in its place needs no further package."
        )
    if kind == "tiktoken":
        return
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{path} is not a SentencePiece vocabulary, or damaged. Download it again.") from error


def _is_tiktoken(path: Path) -> bool:
    """Whether the lines of the file have a token in base64 and its rank."""
    with path.open("rb") as file:
        words = file.readline(1024).split()
    return len(words) == 2 and words[1].isdigit()


def public_path(typed: str, source: ModelSource) -> str:
    """The path or hub id by which other programs can load the tokenizer.

    The user's reference, or the local folder if only plugins can resolve the reference (``demo:NAME``; hub ids have no
    colon).
    """
    return typed if ":" not in typed or Path(typed).expanduser().is_dir() else source.path


def token_ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Ids of a text, with the special tokens that the tokenizer adds if ``special``.

    The result of ``tokenizer.encode``. For tokenizers of the library tokenizers it takes three quarters of the time,
    because it doesn't compute each token's place in the text.
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
        tokenizer.encode("a")  # this call sets the backend's options: no truncation, no padding
    return backend
