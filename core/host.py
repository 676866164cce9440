"""The plugin host: one method for each hook, which checks and merges the plugins' return values.

When each hook is called is documented in :mod:`.hookspecs`. The callers keep the results in plain dicts and tuples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from trunkline.core.types import (
    Head,
    ModelInfo,
    ModelSource,
    RequestObserver,
    ServedModel,
    Serves,
    Settings,
    SettingsGroup,
    Stage,
    Tokenizer,
    Transform,
)

from .discovery import CORE, Plugin, Provided, check_settings, check_stage
from .errors import ModelError, PluginError
from .registry import Registry, check_kind

if TYPE_CHECKING:
    import torch
    import typer
    from litestar.config.app import AppConfig
    from prometheus_client.registry import Collector

    from trunkline.core.types import EngineClient, ExpertObserver, Model

log = logging.getLogger(__name__)
WHEN = ("default", "alone", "on_request", "no")


class Host(Registry):
    """The plugins of one process, by hook."""

    def __init__(self, found: Iterable[Plugin] = (), *, required: Collection[str] = ()) -> None:
        super().__init__(found, required=required)
        self._owners: dict[str, str] = {}  # task -> plugin that answered for it
        self._settings: dict[str, SettingsGroup] | None = None

    def settings(self) -> dict[str, SettingsGroup]:
        """The plugins' settings groups by name. The hook is called once and the result kept."""
        if self._settings is None:
            groups: dict[str, SettingsGroup] = {}
            for plugin, group in self.ask("trunkline_settings"):
                check_kind(plugin, "trunkline_settings", group, SettingsGroup)
                _put(groups, group.name, group, plugin, "settings group")
                check_settings(plugin, group)
            self._settings = dict(sorted(groups.items()))
        return self._settings

    def commands(self, app: typer.Typer) -> None:
        """Let plugins add commands. A failure is logged as a warning, so that the other commands can be used."""
        for name in sorted(self.plugins):
            try:
                list(self.ask("trunkline_commands", of=[name], app=app))
            except PluginError as error:
                log.warning("%s", error)

    def serves(self, model: ModelInfo, settings: Settings) -> dict[str, Serves]:
        """For each task, whether it can serve the checkpoint."""
        answers: dict[str, Serves] = {}
        for plugin, answer in self.ask("trunkline_serves", model=model, settings=settings):
            check_kind(plugin, "trunkline_serves", answer, Serves)
            _put(answers, answer.task, answer, plugin, "task")
            if answer.when not in WHEN:
                raise PluginError(plugin, f"Serves.when is {answer.when!r}, not one of {', '.join(WHEN)}")
            self._owners[answer.task] = plugin
        return answers

    def heads(self, model: ModelInfo, settings: Settings, tasks: Collection[str]) -> list[Head]:
        """Core's heads and those for the active ``tasks`` of a model; :meth:`serves` was called before."""
        heads: dict[str, Head] = {}
        owners = self._of(tasks) | {CORE}
        for plugin, head in self.items("trunkline_heads", Head, owners, model=model, settings=settings):
            _put(heads, head.name, head, plugin, "head")
        return list(heads.values())

    def transforms(self, model: ModelInfo, settings: Settings) -> tuple[Provided[Transform], ...]:
        """How the weights of a model's linear layers are stored, in the order of the plugins, core last."""
        return self.provided("trunkline_transforms", Transform, model=model, settings=settings)

    def stages(self, model: Model, settings: Settings, tasks: Collection[str]) -> dict[str, Provided[Stage]]:
        """The stages of a loaded model by task, for its active ``tasks`` only."""
        stages: dict[str, Provided[Stage]] = {}
        given = {"model": model, "settings": settings, "ask": self.contributions}
        for plugin, stage in self.items("trunkline_stages", Stage, None, **given):
            check_stage(plugin, stage)
            _put(stages, stage.task, Provided(self.plugins[plugin], stage), plugin, "task")
        return {task: stage for task, stage in stages.items() if task in tasks}

    def expert_observers(self, model: Model, settings: Settings) -> tuple[Provided[ExpertObserver], ...]:
        """The observers of a mixture-of-experts model's routing."""
        return self.provided("trunkline_expert_observers", object, model=model, settings=settings)

    def request_observers(self, settings: Settings) -> tuple[Provided[RequestObserver], ...]:
        """The observers of requests."""
        return self.provided("trunkline_request_observers", RequestObserver, settings=settings)

    def metrics(self, settings: Settings) -> tuple[Provided[Collector], ...]:
        """The collectors for ``/metrics``; :class:`.client.metrics.MetricsPage` checks them."""
        return self.provided("trunkline_metrics", object, settings=settings)

    def controls(self) -> dict[str, Provided[Callable[..., Any]]]:
        """Functions that run in the engine between two passes, by name."""
        controls: dict[str, Provided[Callable[..., Any]]] = {}
        for plugin, mapping in self.ask("trunkline_controls"):
            check_kind(plugin, "trunkline_controls", mapping, dict)
            for name, function in mapping.items():
                if not callable(function):
                    raise PluginError(plugin, f"the control {name!r} is {function!r}, not a function")
                _put(controls, name, Provided(self.plugins[plugin], function), plugin, "control")
        return controls

    def info(self, model: ServedModel, settings: Settings) -> dict[str, Any]:
        """Additional keys for model and server info."""
        keys: dict[str, Any] = {}
        for plugin, mapping in self.ask("trunkline_info", model=model, settings=settings):
            check_kind(plugin, "trunkline_info", mapping, dict)
            for key, value in mapping.items():
                _put(keys, key, value, plugin, "info key")
        return keys

    def routes(
        self, engine: EngineClient, settings: Settings, of: Collection[str] | None = None
    ) -> list[tuple[str, Any]]:
        """(plugin, Litestar handler) pairs; the server checks paths and scopes."""
        given = {"engine": engine, "settings": settings, "ask": self.contributions}
        return list(self.items("trunkline_routes", object, of, **given))

    def app_config(self, config: AppConfig) -> None:
        """Let plugins change Litestar's AppConfig."""
        for _ in self.ask("trunkline_app_config", config=config):
            pass

    # -- first answer wins -------------------------------------------------------------------

    def resolve_model(self, reference: str) -> ModelSource:
        """The local folder of a model reference. ModelError when no plugin resolves it."""
        source = self.first("trunkline_resolve_model", ModelSource, reference=reference)
        if source is None:
            raise ModelError(
                f"No model {reference!r}: it is neither a folder nor known to a plugin. "
                "Give a folder with config.json, a hub id like owner/name, or demo:NAME."
            )
        return source

    def tokenizer(self, source: ModelSource) -> Tokenizer | None:
        """The tokenizer of a model, None when it has none (requests then come as token ids)."""
        found: Tokenizer | None = self.first("trunkline_tokenizer", object, source=source)  # type: ignore[assignment]
        return found

    def weights(self, source: ModelSource) -> Iterable[tuple[str, torch.Tensor]]:
        """The stream of a model's tensors. ModelError when no plugin can read them."""
        stream: Any = self.first("trunkline_weights", object, source=source)
        if stream is None:
            raise ModelError(f"No weights that can be read in {source.path}; safetensors files are needed.")
        tensors: Iterable[tuple[str, torch.Tensor]] = stream
        return tensors

    def _of(self, tasks: Collection[str]) -> set[str]:
        return {self._owners[task] for task in tasks if task in self._owners}


def _put(mapping: dict[str, Any], key: str, value: Any, plugin: str, what: str) -> None:
    """Add a key to merged return values. PluginError when another plugin has returned it."""
    if key in mapping:
        raise PluginError(plugin, f"the {what} {key!r} is already taken by another plugin; leave one out (--no-plugin)")
    mapping[key] = value
