"""Exception types, one per kind of failure.

A message names the cause and the fix; it is shown to users as it stands.
"""

from __future__ import annotations


class TrunklineError(Exception):
    """Base of all errors that trunkline raises on purpose."""


class ConfigError(TrunklineError):
    """A setting, flag or file can't be used. The CLI prints it and exits with status 2."""


class PluginError(TrunklineError):
    """A plugin broke its contract. The message starts with the plugin's name and, if given, its ``origin``
    (distribution and version)."""

    def __init__(self, plugin: str, message: str, origin: str = "") -> None:
        super().__init__(f"plugin {plugin!r}{f' ({origin})' if origin else ''}: {message}")


class ModelError(TrunklineError):
    """A model can't be found, loaded or served; the message says why and what would work."""


class RequestError(TrunklineError):
    """One request is rejected or fails; other requests are not affected.

    ``status`` is the HTTP status; below 500, the error is in the request. ``param`` is the name of the field that
    is wrong, if any. ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class QueueFull(RequestError):
    """The waiting queue is full; the same request may be accepted later."""

    def __init__(self, message: str = "The request queue is full.", retry_after: float = 1.0) -> None:
        super().__init__(message, status=503, retry_after=retry_after)


class EngineDown(RequestError):
    """The engine isn't available: it died, hangs, is being restarted or stopped, or was closed."""

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        super().__init__(message, status=503, retry_after=retry_after)


def describe_error(error: BaseException) -> str:
    """The type and message of an exception."""
    try:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    except BaseException:  # its own __str__ raised
        return type(error).__name__
