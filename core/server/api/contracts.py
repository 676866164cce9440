"""Calls to plugins' route handlers: results are checked, and failures name the plugin."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import msgspec
from litestar.handlers import HTTPRouteHandler

from trunkline.core.discovery import Plugin
from trunkline.core.errors import PluginError, describe_error

from .bodies import AnyRequest

OWNER = "plugin"  # key of a handler's ``opt``: the plugin that it is from, for the log


def contain(handler: HTTPRouteHandler, plugin: Plugin) -> None:
    """Wrap the handler so that its failures end only its request, and its return value is checked.

    SystemExit and KeyboardInterrupt become PluginErrors; so does a return value that isn't the msgspec.Struct of
    the annotation. PluginError for a handler without return annotation.
    """
    function: Callable[..., Any] = handler.fn
    name = getattr(function, "__name__", repr(function))

    def fault(what: str) -> PluginError:
        return PluginError(plugin.name, f"handler {name} {what}", plugin.origin)

    if inspect.signature(function).return_annotation is inspect.Signature.empty:
        raise fault("doesn't say what it returns; annotate it (-> Response, a struct, None)")
    handler.opt[OWNER] = f"{plugin.label}, handler {name}"
    schema = _returned_struct(function)

    def checked(value: Any) -> Any:
        if schema is not None:
            try:
                msgspec.convert(msgspec.to_builtins(value), schema)
            except msgspec.ValidationError as error:
                raise fault(f"returned what is not a {schema.__name__}: {error}") from error
            except TypeError:  # of a type that Litestar serialises and msgspec doesn't
                pass
        return value

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(await function(*args, **kwargs))
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise fault(f"raised {describe_error(error)}") from error

    @functools.wraps(function)
    def call_sync(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(function(*args, **kwargs))
        except Exception:
            raise
        except BaseException as error:
            raise fault(f"raised {describe_error(error)}") from error

    handler(call if inspect.iscoroutinefunction(function) else call_sync)


def owner_of(request: AnyRequest) -> str:
    """The plugin and handler of the request's route, for the log."""
    handler = request.scope.get("route_handler")
    return "core" if handler is None else str(handler.opt.get(OWNER, "core"))


def _returned_struct(function: Callable[..., Any]) -> type[msgspec.Struct] | None:
    """The struct in a handler's return annotation, None if it is something else."""
    try:
        kind = get_type_hints(function).get("return")
    except Exception:  # names that exist for type checkers only
        return None
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None
