"""How surprising is a text? ``POST /surprise`` and ``trunkline surprise``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Serves, SettingsGroup

if TYPE_CHECKING:
    import typer

    from trunkline.core.types import EngineClient, Model, ModelInfo, Settings, Stage

TASK = "surprise"


class SurpriseSettings(Struct, frozen=True):
    surprise_max_tokens: Annotated[int, Meta(ge=2, le=1 << 20, description="Longest text, in tokens.")] = 4096


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(TASK, SurpriseSettings)


@hookimpl
def trunkline_serves(model: ModelInfo) -> Serves:
    if model.causal and model.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return Serves(TASK, "default")
    return Serves(TASK, "no", f"{model.architecture} has no language model head.")


@hookimpl
def trunkline_stages(model: Model, settings: Settings) -> Iterable[Stage]:
    from .stage import SurpriseStage

    return [SurpriseStage(model)] if "lm" in model.heads else []  # each model of the server is asked


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .routes import routes

    return routes(engine, settings[TASK])


@hookimpl
def trunkline_commands(app: typer.Typer) -> None:
    from .command import surprise

    app.command()(surprise)
