"""Records to which experts tokens are sent in mixture-of-experts models; dumps the record and shows it live.

``recorder.py`` runs in the engine. There are no requests for this plugin, so it has no ``Stage``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import SettingsGroup

from .settings import GROUP, MoeStatsSettings

if TYPE_CHECKING:
    import typer

    from trunkline.core.types import EngineClient, ExpertObserver, Model, Settings


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(GROUP, MoeStatsSettings, per_model=True)


@hookimpl
def trunkline_expert_observers(model: Model, settings: Settings) -> Iterable[ExpertObserver]:
    from .recorder import Recorder

    assert model.expert_layers is not None  # the hook is called for mixture-of-experts models only
    return [Recorder(model.name, model.expert_layers, settings[GROUP])]


@hookimpl
def trunkline_controls() -> dict[str, Callable[..., Any]]:
    from . import recorder
    from .settings import DUMP, LOOK, START, STOP

    return {START: recorder.start, STOP: recorder.stop, DUMP: recorder.dump, LOOK: recorder.look}


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .live_routes import live_routes
    from .routes import record_routes
    from .service import Service

    service = Service(engine)
    return [*record_routes(service), *live_routes(service)]


@hookimpl
def trunkline_commands(app: typer.Typer) -> None:
    from .command import experts

    app.command()(experts)
