"""Loads the plugins of a process and calls their hooks.

Plugins are called one at a time, so that errors are reported with the plugin's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .discovery import CORE, Plugin, Provided, check_functions, find, load_module, select
from .errors import PluginError, TrunklineError, describe_error

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", bound="Registry")


class Registry:
    """The plugins of one process. ``plugins`` are loaded; ``quarantined`` could not be loaded."""

    def __init__(self, found: Iterable[Plugin] = (), *, required: Collection[str] = ()) -> None:
        """Load ``found``. PluginError when one in ``required`` can't be loaded; any other is quarantined."""
        self.plugins: dict[str, Plugin] = {}
        self.quarantined: dict[str, tuple[Plugin, PluginError]] = {}
        self.hook_calls = 0  # pluggy calls so far; a test checks that serving requests adds none
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.add_hookcall_monitoring(self._count, lambda *_: None)
        self._load(sorted(found, key=lambda plugin: plugin.name, reverse=True), required)

    @classmethod
    def load(cls: type[R], only: Collection[str] | None = None, without: Collection[str] = ()) -> R:
        """The installed plugins (entry points of group ``trunkline``).

        ``only``: just these and core's own; ``without``: leave these out. ConfigError for names
        that aren't installed, PluginError when one of ``only`` can't be loaded.
        """
        return cls(select(find(), only, without), required={CORE, *(only or ())})

    def _count(self, *_: Any) -> None:
        self.hook_calls += 1

    def _load(self, found: Iterable[Plugin], required: Collection[str]) -> None:
        """Import all, then add hook specifications, then register: a spec may come from a later plugin."""
        steps: tuple[Callable[[Plugin], None], ...] = (load_module, self._specify, self._register)
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

    def _specify(self, plugin: Plugin) -> None:
        function = getattr(plugin.module, "trunkline_hookspecs", None)
        if function is None:
            return
        try:
            module = function()
            if module is not None:
                self._manager.add_hookspecs(module)
        except Exception as error:
            raise PluginError(plugin.name, f"trunkline_hookspecs failed: {describe_error(error)}") from error

    def _register(self, plugin: Plugin) -> None:
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

    # -- calling hooks -----------------------------------------------------------------------

    def ask(self, hook: str, *, of: Collection[str] | None = None, **arguments: Any) -> Iterable[tuple[str, Any]]:
        """Call ``hook`` in every plugin that implements it: yields (plugin, return value) in pluggy's order.

        With ``of``, only these plugins are called. None is left out. PluginError when a plugin raises;
        TrunklineErrors are passed on.
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
                raise PluginError(name, f"{hook} failed: {describe_error(error)}", self.plugins[name].origin) from error
            for one in [answer] if first else answer:
                if one is not None:
                    yield name, one

    def contributions(self, hook: str, /, **arguments: Any) -> tuple[Provided[Any], ...]:
        """Call a hook that a plugin has specified (``ask`` in the arguments of some hooks): all items of the returned
        lists.

        TrunklineError for a hook of core, and for one that no plugin has specified.
        """
        if hook in vars(hookspecs) or not hasattr(self._manager.hook, hook):
            raise TrunklineError(f"ask({hook!r}): no plugin has specified such a hook (trunkline_hookspecs).")
        return self.provided(hook, object, **arguments)

    def first(self, hook: str, kind: type[T], **arguments: Any) -> T | None:
        for plugin, answer in self.ask(hook, **arguments):
            check_kind(plugin, hook, answer, kind)
            found: T = answer
            return found
        return None

    def items(self, hook: str, kind: type, of: Collection[str] | None, **arguments: Any) -> Iterable[tuple[str, Any]]:
        """(plugin, item) of the iterables that plugins return from a hook; the type of each item is checked."""
        for plugin, answer in self.ask(hook, of=of, **arguments):
            check_kind(plugin, hook, answer, Iterable)
            try:
                items = list(answer)
            except TrunklineError:
                raise
            except (Exception, SystemExit, GeneratorExit) as error:  # a generator runs only now
                raise PluginError(
                    plugin, f"{hook} failed: {describe_error(error)}", self.plugins[plugin].origin
                ) from error
            for item in items:
                check_kind(plugin, hook, item, kind)
                yield plugin, item

    def provided(self, hook: str, kind: type, **arguments: Any) -> tuple[Provided[Any], ...]:
        found = self.items(hook, kind, None, **arguments)
        return tuple(Provided(self.plugins[plugin], item) for plugin, item in found)


def check_kind(plugin: str, hook: str, answer: object, kind: type) -> None:
    if not isinstance(answer, kind):
        raise PluginError(plugin, f"{hook} answered with {type(answer).__name__}, not {kind.__name__}")
