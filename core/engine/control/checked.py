"""Calls to controls of plugins: results are checked, and failures name the plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trunkline.core.discovery import Provided
from trunkline.core.engine.checks import encoded
from trunkline.core.engine.contracts import guarded
from trunkline.core.errors import PluginError, describe_error


class CheckedControl:
    """Calls a control and checks its result."""

    def __init__(self, name: str, provided: Provided[Callable[..., Any]]) -> None:
        self._name = name
        self._provided = provided

    def __call__(self, model: Any, **arguments: Any) -> Any:
        """The control's return value, which was checked to be encodable. RequestError for the caller; PluginError."""
        with guarded(self._raised, self._name):
            answer = self._provided.value(model, **arguments)
        try:
            encoded(answer)
        except ValueError as error:
            raise self._fault(f"returned a wrong value: {error}") from error
        return answer

    def _raised(self, _: str, error: BaseException) -> PluginError:
        return self._fault(f"raised {describe_error(error)}")

    def _fault(self, what: str) -> PluginError:
        return self._provided.failed(f"the control {self._name!r} {what}")
