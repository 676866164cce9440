"""Calls plugins' logits processors and stop conditions: failures are caught and counted, slow calls are logged.

A failure ends the request that it happened in. It isn't counted as a failure of the generation task, whose requests
without this extension are unaffected.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from trunkline.core.errors import RequestError, describe_error
from trunkline.core.types import MAX_FAILURES, SLOW_SECONDS, Contribution, Request

log = logging.getLogger("trunkline.generation")

FAILED_MESSAGE = "Generation failed; the server's log has the reason."
MAX_MATCHED = 1024  # characters that a stop condition may return


class Extension:
    """A logits processor or stop condition, with the number of its failures."""

    def __init__(self, contribution: Contribution, method: str) -> None:
        """``method``: the one that is called for each token. PluginError if the object lacks it, or ``admit``."""
        self._contribution = contribution
        self._object = contribution.value
        self._method = method
        self.label = type(contribution.value).__name__
        for needed in ("admit", method):
            if not callable(getattr(self._object, needed, None)):
                raise contribution.failed(f"{self.label} has no method {needed}")
        self._failures: Counter[str] = Counter()  # consecutive ones of each method
        self._off = False
        self._slow_methods: set[str] = set()  # that were logged

    def admit(self, request: Request) -> Any | None:
        """The extension's state for a request; None if it doesn't apply to it. RequestError refuses the request."""
        if self._off:
            self._refuse_if_applicable(request)
            return None
        state = self._call("admit", request)
        if state is not None:
            self.record_success("admit")
        return state

    def __call__(self, *arguments: Any) -> Any:
        """Call the method for each token and return its result. RequestError ends the request."""
        if self._off:
            raise self._unavailable()
        return self._call(self._method, *arguments)

    def record_success(self, method: str) -> None:
        """Reset the number of consecutive failures of a method."""
        self._failures[method] = 0

    def record_failure(self, method: str, problem: str) -> RequestError:
        """Log and count a failure of a method, and switch the extension off if there were too many.

        Returns the error for the request's client. ``problem`` is logged after the method's name.
        """
        log.error("%s", self._contribution.failed(f"{self.label}.{method} {problem}"))
        self._failures[method] += 1
        if self._failures[method] >= MAX_FAILURES and not self._off:
            self._off = True
            message = f"{self.label} is switched off: {method} failed {MAX_FAILURES} times in a row"
            log.error("%s", self._contribution.failed(message))
        return RequestError(FAILED_MESSAGE, status=500)

    def _refuse_if_applicable(self, request: Request) -> None:
        """RequestError 503, unless the extension leaves the request alone: it may exist to enforce a rule."""
        try:
            if self._object.admit(request) is None:
                return
        except BaseException as error:
            raise self._unavailable() from error
        raise self._unavailable()

    def _call(self, method: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            result = getattr(self._object, method)(*arguments)
        except BaseException as error:  # SystemExit would end the engine
            if (refusal := _client_error(error)) is not None:
                raise refusal from error
            raise self.record_failure(method, f"raised {describe_error(error)}") from error
        took = time.perf_counter() - began
        if took > SLOW_SECONDS and method not in self._slow_methods:
            self._slow_methods.add(method)
            message = f"{self.label}.{method} took {took:.2f} s, during which nothing else is served"
            log.warning("%s", self._contribution.failed(message))
        return result

    def _unavailable(self) -> RequestError:
        reason = self._contribution.failed(f"{self.label} is switched off after {MAX_FAILURES} failures in a row")
        return RequestError(f"{reason}. A restart switches it on again; --no-plugin leaves it out.", status=503)


class Processor(Extension):
    """A plugin's logits processor."""

    def __init__(self, contribution: Contribution) -> None:
        super().__init__(contribution, "apply")


class Condition(Extension):
    """A plugin's stop condition."""

    def __init__(self, contribution: Contribution) -> None:
        super().__init__(contribution, "check")

    def matched(self, state: Any, token: int, text: str) -> str | None:
        """Why the sequence ends with ``token``, None if it goes on. RequestError for invalid return values."""
        matched = self(state, token, text)
        if matched is None or (isinstance(matched, str) and len(matched) <= MAX_MATCHED and _is_unicode(matched)):
            self.record_success("check")
            return matched
        raise self.record_failure(
            "check", f"returned {matched!r:.100}, not None or a string of at most {MAX_MATCHED} characters"
        )


class Extensions:
    """The logits processors and stop conditions of a model, in the order in which they are called."""

    def __init__(self, processors: Iterable[Contribution] = (), conditions: Iterable[Contribution] = ()) -> None:
        self._processors = tuple(Processor(contribution) for contribution in processors)
        self._conditions = tuple(Condition(contribution) for contribution in conditions)

    def check(self, custom_params: dict[str, Any] | None) -> None:
        """RequestError if there are ``custom_params`` and no extension that could read them."""
        if custom_params and not self._processors and not self._conditions:
            raise RequestError(
                "custom_params are read by logits processors and stop conditions of installed plugins, and this server "
                "has none; leave them out.",
                param="custom_params",
            )

    def processors(self, request: Request) -> list[tuple[Processor, Any]]:
        """The processors that change the request's logits, with their states."""
        return [(each, state) for each in self._processors if (state := each.admit(request)) is not None]

    def conditions(self, request: Request) -> list[tuple[Condition, Any]]:
        """The conditions that may end the request's sequence, with their states."""
        return [(each, state) for each in self._conditions if (state := each.admit(request)) is not None]


def _client_error(error: BaseException) -> RequestError | None:
    """A copy of a RequestError that a plugin raised; None if it is another exception or has invalid values."""
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
