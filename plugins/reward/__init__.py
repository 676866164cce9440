"""Scores of sequence-classification heads, including reward models: ``/classify`` and ``/v1/classify``.

``stage.py`` runs in the engine; the head itself is in core.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Serves

from .schemas import TASK

if TYPE_CHECKING:
    from trunkline.core.types import EngineClient, Model, ModelInfo, Settings, Stage


@hookimpl
def trunkline_serves(model: ModelInfo) -> Serves:
    if model.score_rows:
        return Serves(TASK, "default")
    need = f"/classify needs a …ForSequenceClassification checkpoint, and {model.architecture} has no such head."
    return Serves(TASK, "no", f"{need} Use /encode for vectors.", detail=f"It serves /encode then; {need}")


@hookimpl
def trunkline_stages(model: Model, settings: Settings) -> Iterable[Stage]:
    from .stage import RewardStage

    return [RewardStage(model)]


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .openai_routes import openai_routes
    from .routes import classify_routes
    from .service import Service

    service = Service(engine, settings)
    return [*classify_routes(service), *openai_routes(service)]
