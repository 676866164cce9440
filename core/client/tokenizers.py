"""The tokenizers of the front process, and tokenising off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._known: dict[str, Tokenizer | None] = {}

    def load(self) -> None:
        """Read all of them from their files. ConfigError for a chat template that can't be read."""
        self._known = {settings.name: load_tokenizer(settings, self._host) for settings in self._config.models}

    def get(self, model: str) -> Tokenizer | None:
        return self._known.get(model)

    def rename(self, models: Sequence[ServedModel]) -> None:
        """Follow a weight update: a model's tokenizer stays, whatever the model is called now."""
        self._known = renamed(self._known, models)


def load_tokenizer(settings: ModelSettings, host: Host) -> Tokenizer | None:
    """A model's tokenizer, with the user's chat template if one was given; None where it is skipped or missing."""
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


def renamed(tokenizers: Mapping[str, Tokenizer | None], models: Sequence[ServedModel]) -> dict[str, Tokenizer | None]:
    """The same tokenizers by the names that models have after a weight update; their old ones are aliases."""
    found = {}
    for model in models:
        known = (tokenizers[name] for name in (model.name, *model.aliases) if name in tokenizers)
        found[model.name] = next(known, None)
    return found


async def tokenize(
    engine: EngineClient, tokenizer: Tokenizer, texts: Sequence[str], special: bool, limit: int | None
) -> list[list[int]]:
    """Ids of each text; RequestError for one that is longer by far than ``limit`` tokens."""
    if limit is not None:
        for text in texts:
            check_characters(len(text), limit)

    def encode(start: int, end: int) -> list[list[int]]:
        return [token_ids(tokenizer, text, special) for text in texts[start:end]]

    return await run_in_slices(engine, map(len, texts), encode)
