"""Sentence embeddings: the routes of SGLang, OpenAI, Cohere and Text Embeddings Inference.

``stage.py`` (pooling and the modules after it) runs in the engine; everything else runs in the
front. ``recipe.py`` reads from a checkpoint's folder how its vectors are computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Serves, SettingsGroup

from .settings import GROUP, TASK, EmbeddingSettings

if TYPE_CHECKING:
    from trunkline.core.types import EngineClient, Model, ModelInfo, ServedModel, Settings, Stage


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(GROUP, EmbeddingSettings, per_model=True)


@hookimpl
def trunkline_serves(model: ModelInfo, settings: Settings) -> Serves:
    from .recipe import serves

    return serves(model, settings[GROUP])


@hookimpl
def trunkline_stages(model: Model, settings: Settings) -> Iterable[Stage]:
    from .recipe import read_recipe
    from .stage import EmbeddingStage

    return [EmbeddingStage(model, read_recipe(model.info, settings[GROUP]))]


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .cohere_routes import cohere_routes
    from .openai_routes import openai_routes
    from .routes import encode_routes
    from .service import Service
    from .tei_routes import tei_routes

    service = Service(engine, settings)
    return [*encode_routes(service), *openai_routes(service), *cohere_routes(service), *tei_routes(service)]


@hookimpl
def trunkline_info(model: ServedModel, settings: Settings) -> dict[str, Any]:
    from .recipe import read_recipe

    return read_recipe(model.info, settings[GROUP]).facts() if TASK in model.tasks else {}
