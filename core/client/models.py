"""Chooses the served model for a request, by name and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import ServedModel


class ModelQuery(Struct):
    """Query parameters of routes about a model."""

    model: Annotated[str, Meta(description="A served name or alias; by default the first model.")] = ""


class ModelsQuery(Struct):
    """Query parameters of routes about one or all models."""

    model: Annotated[str, Meta(description="A served name or alias; by default all models.")] = ""


NO_NAME = ("default", "unknown", "dummy")
"""Names that routers and SDKs send when they know no model name. They count as no name, unless a model has one of
them."""


def find(models: Sequence[ServedModel], name: str | None) -> ServedModel | None:
    """The model with exactly this served name or alias."""
    return next((model for model in models if name == model.name or name in model.aliases), None)


def named_model(models: Sequence[ServedModel], name: str | None) -> ServedModel | None:
    """The model that ``?model=`` names in a call about models, None when it names none.

    With one model loaded an unknown name is ignored; with several it is a RequestError that lists them.
    """
    found = find(models, name)
    if found is None and name and name not in NO_NAME and len(models) > 1:
        raise _unknown(name, models)
    return found


def named_or_primary(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The model for a route about models: the named one, else the primary. Errors as in :func:`named_model`."""
    if not models:
        raise EngineDown("No model is loaded yet; try again soon.")
    return named_model(models, name) or models[0]


def choose_model(models: Sequence[ServedModel], task: str, name: str | None = None) -> ServedModel:
    """The model for a request: the named one; without a name, the first that serves ``task``.

    If the name is unknown and only one model serves the task, that model is chosen. RequestError if several models
    do (``model_not_found``, with their names), if the named model doesn't, and if none does.
    """
    if not models:
        raise EngineDown("No model is loaded yet; try again soon.")
    found = find(models, name)
    serving = [model for model in models if task in model.tasks]
    if found is not None and found not in serving:
        raise RequestError(_refusal(found, task), param="model")
    if not serving:
        raise RequestError(_no_model_serves(models, task), param="model")
    if found is None and name and name not in NO_NAME and len(serving) > 1:
        raise _unknown(name, serving)
    return found or serving[0]


def _unknown(name: str, models: Sequence[ServedModel]) -> RequestError:
    known = ", ".join(model.name for model in models)
    return RequestError(
        f"The model {name!r} does not exist; there are: {known}.", param="model", code="model_not_found"
    )


def _refusal(model: ServedModel, task: str) -> str:
    """Why a model doesn't serve a task, and what would work."""
    served = f"The model {model.name!r} does not serve {task}; it serves: {', '.join(model.tasks)}."
    return model.refused.get(task) or served


def _no_model_serves(models: Sequence[ServedModel], task: str) -> str:
    if len(models) == 1:
        return _refusal(models[0], task)
    reasons = " ".join(f"{model.name}: {_refusal(model, task)}" for model in models)
    return f"No loaded model serves {task}. {reasons}"


def version_of(models: Sequence[ServedModel], name: str) -> str:
    """The label of a model's current weights, "" for an unknown name."""
    return next((model.weight_version for model in models if name in (model.name, *model.aliases)), "")
