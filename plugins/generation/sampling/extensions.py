"""Third parties' logits processors and stop conditions as the stage calls them: guarded, timed, switched off.

A failure ends its request and never counts against the task: its plugin isn't at fault.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Contribution, Request

log = logging.getLogger("trunkline.generation")

FAILED = "Generation failed; the server's log has the reason."
MAX_FAILURES = 5  # in a row, after which an extension is switched off
SLOW = 0.1  # seconds of one call
MAX_MATCHED = 1024  # characters of what a stop condition says


class Extension:
    """One object of a hook, with how often it failed."""

    def __init__(self, contribution: Contribution, method: str) -> None:
        """``method``: called for each token. PluginError when the object lacks it, or ``admit``."""
        self._contribution = contribution
        self._value = contribution.value
        self._method = method
        self.label = type(contribution.value).__name__
        for needed in ("admit", method):
            if not callable(getattr(self._value, needed, None)):
                raise contribution.failed(f"{self.label} has no method {needed}")
        self._failures: Counter[str] = Counter()  # in a row by method, of requests that it takes part in
        self._off = False
        self._warned: set[str] = set()

    def admit(self, request: Request) -> Any | None:
        """The state for a request that it takes part in, else None. RequestError for the client."""
        if self._off:
            self._refuse_if_wanted(request)
            return None
        state = self._call("admit", request)
        if state is not None:
            self.succeeded("admit")
        return state

    def __call__(self, *arguments: Any) -> Any:
        """What the method for each token returns. RequestError ends the request."""
        if self._off:
            raise self._unavailable()
        return self._call(self._method, *arguments)

    def succeeded(self, method: str) -> None:
        """A call did what it should."""
        self._failures[method] = 0

    def failed(self, method: str, what: str) -> RequestError:
        """Count and log something that a method did wrong; the error for the request's client."""
        log.error("%s", self._contribution.failed(f"{self.label}.{method} {what}"))
        self._failures[method] += 1
        if self._failures[method] >= MAX_FAILURES and not self._off:
            self._off = True
            message = f"{self.label} is switched off: {method} failed {MAX_FAILURES} times in a row"
            log.error("%s", self._contribution.failed(message))
        return RequestError(FAILED, status=500)

    def _refuse_if_wanted(self, request: Request) -> None:
        """RequestError 503, unless it would leave the request alone: it may be there to enforce something."""
        try:
            if self._value.admit(request) is None:
                return
        except BaseException as error:
            raise self._unavailable() from error
        raise self._unavailable()

    def _call(self, method: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            result = getattr(self._value, method)(*arguments)
        except BaseException as error:  # SystemExit would end the engine
            if (answer := _answer(error)) is not None:
                raise answer from error
            raise self.failed(method, f"raised {_describe(error)}") from error
        took = time.perf_counter() - began
        if took > SLOW and method not in self._warned:
            self._warned.add(method)
            message = f"{self.label}.{method} took {took:.2f} s, during which nothing else is served"
            log.warning("%s", self._contribution.failed(message))
        return result

    def _unavailable(self) -> RequestError:
        failed = self._contribution.failed(f"{self.label} is switched off after {MAX_FAILURES} failures in a row")
        return RequestError(f"{failed}. A restart switches it on again; --no-plugin leaves it out.", status=503)


class Processor(Extension):
    """Changes logits."""

    def __init__(self, contribution: Contribution) -> None:
        super().__init__(contribution, "apply")


class Condition(Extension):
    """Ends sequences."""

    def __init__(self, contribution: Contribution) -> None:
        super().__init__(contribution, "check")

    def matched(self, state: Any, token: int, text: str) -> str | None:
        """What ends the sequence with ``token``. RequestError when that isn't a string that can be sent."""
        matched = self(state, token, text)
        if matched is None or (isinstance(matched, str) and len(matched) <= MAX_MATCHED and _is_unicode(matched)):
            self.succeeded("check")
            return matched
        raise self.failed(
            "check", f"returned {matched!r:.100}, not None or a string of at most {MAX_MATCHED} characters"
        )


class Extensions:
    """All of a model's processors and conditions, in the order in which they are called."""

    def __init__(self, processors: Iterable[Contribution] = (), conditions: Iterable[Contribution] = ()) -> None:
        self._processors = tuple(Processor(one) for one in processors)
        self._conditions = tuple(Condition(one) for one in conditions)

    def check(self, custom_params: dict[str, Any] | None) -> None:
        """RequestError for ``custom_params`` that nothing could read."""
        if custom_params and not self._processors and not self._conditions:
            raise RequestError(
                "custom_params are read by logits processors and stop conditions of installed plugins, and this server "
                "has none; leave them out.",
                param="custom_params",
            )

    def processors(self, request: Request) -> list[tuple[Processor, Any]]:
        """Those that take part in a request, with their states."""
        return [(one, state) for one in self._processors if (state := one.admit(request)) is not None]

    def conditions(self, request: Request) -> list[tuple[Condition, Any]]:
        """Those that take part in a request, with their states."""
        return [(one, state) for one in self._conditions if (state := one.admit(request)) is not None]


def _answer(error: BaseException) -> RequestError | None:
    """A RequestError that can be sent to the client, made of one that a third party raised."""
    if not isinstance(error, RequestError):
        return None
    message, status, param = error.message, error.status, error.param
    if not (isinstance(message, str) and _is_unicode(message) and isinstance(status, int) and 400 <= status <= 599):
        return None
    return RequestError(message, status=status, param=param if isinstance(param, str) and _is_unicode(param) else None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    except BaseException:  # its own __str__ fails
        return type(error).__name__
