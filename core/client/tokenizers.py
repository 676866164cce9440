"""The tokenizers of the front process, and tokenising off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trunkline.core.config import Config
from trunkline.core.errors import ConfigError
from trunkline.core.host import Host
from trunkline.core.model.sources.tokenizer import token_ids
from trunkline.core.settings import ModelSettings
from trunkline.core.types import EngineClient, ServedModel, Tokenizer

from .slices import run_in_slices
from .truncate import check_characters


class Tokenizers:
    """The tokenizer of each model, by the model's served name."""

    def __init__(self, config: Config, host: Host) -> None:
        self._config = config
        self._host = host
        self._by_name: dict[str, Tokenizer | None] = {}

    def load(self) -> None:
        """Load all tokenizers. ConfigError for a chat template that can't be read; ModelError for a tokenizer."""
        self._by_name = {settings.name: load_tokenizer(settings, self._host) for settings in self._config.models}

    def get(self, model: str) -> Tokenizer | None:
        """The tokenizer of a model by its served name; None if it has none."""
        return self._by_name.get(model)

    def rename(self, models: Sequence[ServedModel]) -> None:
        """Called after a weight update: find the tokenizers by the models' new names; the old ones are aliases."""
        tokenizers = {}
        for model in models:
            names = (model.name, *model.aliases)
            tokenizers[model.name] = next((self._by_name[name] for name in names if name in self._by_name), None)
        self._by_name = tokenizers


def load_tokenizer(settings: ModelSettings, host: Host) -> Tokenizer | None:
    """A model's tokenizer, with the chat template of ``--chat-template`` if given.

    None with ``--skip-tokenizer-init``, or if the checkpoint has none. ConfigError when the template can't be read.
    """
    if settings.skip_tokenizer_init:
        if settings.chat_template:
            raise ConfigError("--chat-template has no effect with --skip-tokenizer-init; leave one of them out.")
        return None
    tokenizer = host.tokenizer(host.resolve_model(settings.tokenizer_path or settings.reference))
    if tokenizer is not None and settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template: can't read {settings.chat_template}: {error}.") from None
    return tokenizer


async def tokenize(
    engine: EngineClient, tokenizer: Tokenizer, texts: Sequence[str], special: bool, limit: int | None
) -> list[list[int]]:
    """The token ids of each text, see :meth:`trunkline.core.types.EngineClient.tokenize`.

    ``special``: whether to add special tokens. RequestError for a text that is far longer than ``limit`` tokens.
    """
    if limit is not None:
        for text in texts:
            check_characters(len(text), limit)

    def encode(start: int, end: int) -> list[list[int]]:
        return [token_ids(tokenizer, text, special) for text in texts[start:end]]

    return await run_in_slices(engine, map(len, texts), encode)
