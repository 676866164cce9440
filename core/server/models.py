"""Which model a request means, and the tokenizers of the front process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import ModelSettings
from ..errors import ConfigError, EngineDown, RequestError
from ..host import Host
from ..types import ServedModel, Tokenizer


def named(models: Sequence[ServedModel], name: str | None) -> ServedModel | None:
    """The model of that name or alias, None when no name was given.

    With one model loaded an unknown name is ignored, because clients send "default" and the like;
    with several it is a RequestError that lists them.
    """
    if not name:
        return None
    for model in models:
        if name == model.name or name in model.aliases:
            return model
    if len(models) < 2:
        return None
    known = ", ".join(model.name for model in models)
    raise RequestError(f"The model {name!r} does not exist; there are: {known}.", param="model", code="model_not_found")


def asked_about(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The model that a call about a model means: the named one, else the primary. Errors as in :func:`named`."""
    if not models:
        raise EngineDown("No model is loaded yet; try again soon.")
    return named(models, name) or models[0]


def choose(models: Sequence[ServedModel], task: str, name: str | None) -> ServedModel:
    """The named model, else the first that serves the task. RequestError when it doesn't."""
    if not models:
        raise EngineDown("No model is loaded yet; try again soon.")
    wanted = named(models, name)
    candidates = models if wanted is None else [wanted]
    for model in candidates:
        if task in model.tasks:
            return model
    first = candidates[0]
    served = f"The model {first.name!r} does not serve {task}; it serves: {', '.join(first.tasks)}."
    raise RequestError(first.refused.get(task) or served, param="model")


def load_tokenizer(settings: ModelSettings, host: Host) -> Tokenizer | None:
    """A model's tokenizer, with the user's chat template if one was given."""
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


def version_of(models: Sequence[ServedModel], name: str) -> str:
    """The label of the weights that a model has now, "" for an unknown one."""
    return next((model.weight_version for model in models if name in (model.name, *model.aliases)), "")
