"""Reranking: ``/v1/rerank``, ``/rerank``, ``/v2/rerank``, ``/score`` and ``/v1/score``.

A model scores how well a document answers a query: a cross-encoder with its score head, or a
causal model by the logits of its answer tokens. ``stage.py`` runs in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Serves, SettingsGroup

from .settings import GROUP, RerankSettings

if TYPE_CHECKING:
    from trunkline.core.types import EngineClient, Model, ModelInfo, Settings, Stage


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(GROUP, RerankSettings, per_model=True)


@hookimpl
def trunkline_serves(model: ModelInfo) -> Serves:
    from .detect import serves

    return serves(model)


@hookimpl
def trunkline_stages(model: Model, settings: Settings) -> Iterable[Stage]:
    from .detect import is_language_model
    from .stage import LabelStage, ScoreStage

    return [LabelStage(model) if is_language_model(model.info) else ScoreStage(model)]


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .routes import rerank_routes
    from .score_routes import score_routes
    from .service import Service

    service = Service(engine, settings)
    return [*rerank_routes(service), *score_routes(service)]
