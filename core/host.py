"""The plugin host: loads and checks plugins, calls their hooks and merges what they return.

Each plugin is called by itself, so that a wrong answer is reported with the plugin's name. When each hook is
called is documented in :mod:`.hookspecs`. The callers keep what the hooks return in plain dicts and tuples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

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
)

from . import hookspecs
from .discovery import (
    CORE,
    Found,
    Provided,
    check_functions,
    check_settings,
    check_stage,
    describe,
    find,
    load_module,
    select,
)
from .errors import ModelError, PluginError, TrunklineError

if TYPE_CHECKING:
    import torch
    import typer
    from litestar.config.app import AppConfig
    from prometheus_client.registry import Collector

    from trunkline.core.types import EngineClient, ExpertObserver, Model

log = logging.getLogger(__name__)
T = TypeVar("T")


class Host:
    """The plugins of one process. ``plugins`` are in use, ``quarantined`` could not be loaded."""

    def __init__(self, found: Iterable[Found] = (), *, required: Collection[str] = ()) -> None:
        """Load ``found``. A plugin in ``required`` that can't be loaded raises, any other is quarantined."""
        self.plugins: dict[str, Found] = {}
        self.quarantined: dict[str, tuple[Found, PluginError]] = {}
        self.hook_calls = 0  # pluggy calls so far; a test holds it still while requests are served
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.add_hookcall_monitoring(self._count, lambda *_: None)
        self._owners: dict[str, str] = {}  # task -> plugin that answered for it
        self._settings: dict[str, SettingsGroup] | None = None
        self._load(sorted(found, key=lambda plugin: plugin.name, reverse=True), required)

    @classmethod
    def load(cls, only: Collection[str] | None = None, without: Collection[str] = ()) -> Host:
        """A host with the installed plugins (entry points of group ``trunkline``).

        ``only``: just these and core's own; ``without``: leave these out. ConfigError for names
        that aren't installed, PluginError when one of ``only`` can't be loaded.
        """
        return cls(select(find(), only, without), required={CORE, *(only or ())})

    def _count(self, *_: Any) -> None:
        self.hook_calls += 1

    def _load(self, found: Iterable[Found], required: Collection[str]) -> None:
        """Import all, then add hook specifications, then register: a spec may come from a later plugin."""
        steps: tuple[Callable[[Found], None], ...] = (load_module, self._specify, self._register)
        left = list(found)
        for step in steps:
            for plugin in tuple(left):
                try:
                    step(plugin)
                except PluginError as error:
                    if plugin.name in required:
                        raise
                    log.warning("%s; it is left out", error)
                    self.quarantined[plugin.name] = (plugin, error)
                    left.remove(plugin)
        self.plugins = dict(sorted(self.plugins.items()))

    def _specify(self, plugin: Found) -> None:
        function = getattr(plugin.module, "trunkline_hookspecs", None)
        if function is None:
            return
        try:
            module = function()
            if module is not None:
                self._manager.add_hookspecs(module)
        except Exception as error:
            raise PluginError(plugin.name, f"trunkline_hookspecs failed: {describe(error)}") from error

    def _register(self, plugin: Found) -> None:
        known = {name for name in vars(self._manager.hook) if name.startswith("trunkline_")}
        plugin.hooks = check_functions(plugin, known)
        try:
            self._manager.register(plugin.module, name=plugin.name)
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=plugin.name)
            raise PluginError(plugin.name, str(error).splitlines()[-1]) from error
        self.plugins[plugin.name] = plugin

    def specification(self, hook: str) -> Callable[..., Any]:
        """The function that specifies ``hook``; its docstring is the manual."""
        function: Callable[..., Any] = getattr(self._manager.hook, hook).spec.function
        return function

    # -- asking ------------------------------------------------------------------------------

    def ask(self, hook: str, *, of: Collection[str] | None = None, **arguments: Any) -> Iterable[tuple[str, Any]]:
        """(plugin, answer) of every plugin that implements ``hook``, lazily and in pluggy's order.

        ``of`` restricts who is asked; None answers are left out. PluginError when one raises,
        except for TrunklineErrors, which speak for themselves.
        """
        caller = getattr(self._manager.hook, hook)
        first = bool(caller.spec and caller.spec.opts["firstresult"])
        for name in [implementation.plugin_name for implementation in reversed(caller.get_hookimpls())]:
            if of is not None and name not in of:
                continue
            others = [plugin.module for other, plugin in self.plugins.items() if other != name]
            try:
                answer = self._manager.subset_hook_caller(hook, others)(**arguments)
            except TrunklineError:
                raise
            except (Exception, SystemExit, GeneratorExit) as error:
                raise PluginError(name, f"{hook} failed: {describe(error)}", self.plugins[name].origin) from error
            for one in [answer] if first else answer:
                if one is not None:
                    yield name, one

    def settings(self) -> dict[str, SettingsGroup]:
        """The plugins' settings groups by name; the hook is called once and the answer kept."""
        if self._settings is None:
            groups: dict[str, SettingsGroup] = {}
            for plugin, group in self.ask("trunkline_settings"):
                _check(plugin, "trunkline_settings", group, SettingsGroup)
                _put(groups, group.name, group, plugin, "settings group")
                check_settings(plugin, group)
            self._settings = dict(sorted(groups.items()))
        return self._settings

    def commands(self, app: typer.Typer) -> None:
        """Let plugins add commands. One that fails is warned about, so that the others stay usable."""
        for name in sorted(self.plugins):
            try:
                list(self.ask("trunkline_commands", of=[name], app=app))
            except PluginError as error:
                log.warning("%s", error)

    def serves(self, model: ModelInfo) -> dict[str, Serves]:
        """Each task's answer to "can you serve this checkpoint?"."""
        answers: dict[str, Serves] = {}
        for plugin, answer in self.ask("trunkline_serves", model=model):
            _check(plugin, "trunkline_serves", answer, Serves)
            _put(answers, answer.task, answer, plugin, "task")
            if answer.when not in ("default", "on_request", "no"):
                raise PluginError(plugin, f"Serves.when is {answer.when!r}, not 'default', 'on_request' or 'no'")
            self._owners[answer.task] = plugin
        return answers

    def heads(self, model: ModelInfo, settings: Settings, tasks: Collection[str]) -> list[Head]:
        """Core's heads and those for the active ``tasks`` of a model; :meth:`serves` was called before."""
        heads: dict[str, Head] = {}
        owners = self._of(tasks) | {CORE}
        for plugin, head in self._items("trunkline_heads", Head, owners, model=model, settings=settings):
            _put(heads, head.name, head, plugin, "head")
        return list(heads.values())

    def stages(self, model: Model, settings: Settings, tasks: Collection[str]) -> dict[str, Provided[Stage]]:
        """The stages of a loaded model by task, for its active ``tasks`` only."""
        stages: dict[str, Provided[Stage]] = {}
        for plugin, stage in self._items("trunkline_stages", Stage, None, model=model, settings=settings):
            check_stage(plugin, stage)
            _put(stages, stage.task, Provided(self.plugins[plugin], stage), plugin, "task")
        return {task: stage for task, stage in stages.items() if task in tasks}

    def expert_observers(self, model: Model, settings: Settings) -> tuple[Provided[ExpertObserver], ...]:
        """Who is shown a mixture-of-experts model's choices."""
        return self._provided("trunkline_expert_observers", object, model=model, settings=settings)

    def request_observers(self, settings: Settings) -> tuple[Provided[RequestObserver], ...]:
        """Who is told of requests."""
        return self._provided("trunkline_request_observers", RequestObserver, settings=settings)

    def metrics(self, settings: Settings) -> tuple[Provided[Collector], ...]:
        """Whose numbers are in ``/metrics``; the page checks them."""
        return self._provided("trunkline_metrics", object, settings=settings)

    def controls(self) -> dict[str, Provided[Callable[..., Any]]]:
        """Functions that run in the engine between two passes, by name."""
        controls: dict[str, Provided[Callable[..., Any]]] = {}
        for plugin, mapping in self.ask("trunkline_controls"):
            _check(plugin, "trunkline_controls", mapping, dict)
            for name, function in mapping.items():
                if not callable(function):
                    raise PluginError(plugin, f"the control {name!r} is {function!r}, not a function")
                _put(controls, name, Provided(self.plugins[plugin], function), plugin, "control")
        return controls

    def info(self, model: ServedModel, settings: Settings) -> dict[str, Any]:
        """Extra keys for model and server info."""
        keys: dict[str, Any] = {}
        for plugin, mapping in self.ask("trunkline_info", model=model, settings=settings):
            _check(plugin, "trunkline_info", mapping, dict)
            for key, value in mapping.items():
                _put(keys, key, value, plugin, "info key")
        return keys

    def routes(
        self, engine: EngineClient, settings: Settings, of: Collection[str] | None = None
    ) -> list[tuple[str, Any]]:
        """(plugin, Litestar handler) pairs; the server checks paths and scopes."""
        return list(self._items("trunkline_routes", object, of, engine=engine, settings=settings))

    def app_config(self, config: AppConfig) -> None:
        """Let plugins change Litestar's AppConfig."""
        for _ in self.ask("trunkline_app_config", config=config):
            pass

    # -- first answer wins -------------------------------------------------------------------

    def resolve_model(self, reference: str) -> ModelSource:
        """The local folder of a model reference. ModelError when nobody knows it."""
        source = self._first("trunkline_resolve_model", ModelSource, reference=reference)
        if source is None:
            raise ModelError(
                f"No model {reference!r}: it is neither a folder nor known to a plugin. "
                "Give a folder with config.json, a hub id like owner/name, or demo:NAME."
            )
        return source

    def tokenizer(self, source: ModelSource) -> Tokenizer | None:
        """The tokenizer of a model, None when it has none (requests then come as token ids)."""
        found: Tokenizer | None = self._first("trunkline_tokenizer", object, source=source)  # type: ignore[assignment]
        return found

    def weights(self, source: ModelSource) -> Iterable[tuple[str, torch.Tensor]]:
        """The stream of a model's tensors. ModelError when nobody can read them."""
        stream: Any = self._first("trunkline_weights", object, source=source)
        if stream is None:
            raise ModelError(f"No weights that can be read in {source.path}; safetensors files are needed.")
        tensors: Iterable[tuple[str, torch.Tensor]] = stream
        return tensors

    def _first(self, hook: str, kind: type[T], **arguments: Any) -> T | None:
        for plugin, answer in self.ask(hook, **arguments):
            _check(plugin, hook, answer, kind)
            found: T = answer
            return found
        return None

    def _items(self, hook: str, kind: type, of: Collection[str] | None, **arguments: Any) -> Iterable[tuple[str, Any]]:
        """The items of plugins' iterable answers, each checked."""
        for plugin, answer in self.ask(hook, of=of, **arguments):
            _check(plugin, hook, answer, Iterable)
            try:
                items = list(answer)
            except TrunklineError:
                raise
            except (Exception, SystemExit, GeneratorExit) as error:  # a generator runs only now
                raise PluginError(plugin, f"{hook} failed: {describe(error)}", self.plugins[plugin].origin) from error
            for item in items:
                _check(plugin, hook, item, kind)
                yield plugin, item

    def _provided(self, hook: str, kind: type, **arguments: Any) -> tuple[Provided[Any], ...]:
        found = self._items(hook, kind, None, **arguments)
        return tuple(Provided(self.plugins[plugin], item) for plugin, item in found)

    def _of(self, tasks: Collection[str]) -> set[str]:
        return {self._owners[task] for task in tasks if task in self._owners}


def _check(plugin: str, hook: str, answer: object, kind: type) -> None:
    if not isinstance(answer, kind):
        raise PluginError(plugin, f"{hook} answered with {type(answer).__name__}, not {kind.__name__}")


def _put(mapping: dict[str, Any], key: str, value: Any, plugin: str, what: str) -> None:
    """Add to a merged answer. PluginError when another answer has the key."""
    if key in mapping:
        raise PluginError(plugin, f"the {what} {key!r} is already taken by another plugin; leave one out (--no-plugin)")
    mapping[key] = value
