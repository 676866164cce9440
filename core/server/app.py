"""Builds the Litestar application from the routes of core and of the plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from litestar import Litestar
from litestar.config.app import AppConfig
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler

from trunkline.core.errors import EngineDown, PluginError, RequestError
from trunkline.core.host import Host
from trunkline.core.server.api.body_limits import BodyLimits
from trunkline.core.server.api.contracts import contain
from trunkline.core.server.routes import routes
from trunkline.core.server.routes.tensors import tensor_routes
from trunkline.core.server.routes.weights import downloader, weight_routes
from trunkline.core.settings import ModelSettings
from trunkline.core.types import EngineClient, ServedModel, Settings

from .auth import SCOPES, Authorizer
from .docs import docs_routes, openapi_config
from .exception_handlers import add_request_id, on_error, on_http_error, on_request_error
from .info import InfoReplies
from .lifecycle import Lifecycle
from .openapi import Document, check_declarations
from .replicas import declared, merge_replies

if TYPE_CHECKING:
    from trunkline.core.client.metrics import MetricsPage


def create_app(
    host: Host,
    engine: EngineClient,
    settings: Settings,
    *,
    models: Sequence[ModelSettings] = (),
    lifecycle: Lifecycle | None = None,
    status: Callable[[ServedModel], dict[str, Any]] = lambda model: {},
    metrics: MetricsPage | None = None,
    replicated: bool = False,
) -> Litestar:
    """The application for an engine that is ready. ``metrics``: the content of ``GET /metrics``. ``replicated``: the
    engine may have several replicas, whose replies are merged.

    Calls the hooks ``routes`` and ``app_config``, and ``info``, the latter again after a weight update. PluginError
    when a handler declares no scope, or when there is another one for its path and method.
    """
    server = settings["server"]
    lifecycle = lifecycle or Lifecycle()
    info = InfoReplies(settings, models, lambda model: host.info(model, engine.settings(model.name)), status)
    for model in engine.models:
        info.model_info(model)  # so that wrong return values of plugins fail the start
    locked = {"infer": bool(server.api_key), "admin": bool(server.api_key or server.admin_api_key)}
    document = Document(locked)
    core = (
        *routes(engine, lifecycle, info),
        *weight_routes(engine, downloader(host, settings)),
        *tensor_routes(engine, settings),
        *docs_routes(document),
    )
    own = [("core", handler) for handler in core]
    if metrics is not None:
        from trunkline.core.server.routes.metrics import metrics_route

        own.append(("core", metrics_route(metrics)))
    provided = host.routes(engine, settings)
    handlers = check_routes([*own, *provided])
    for name, handler in provided:
        contain(handler, host.plugins[name])
    if replicated:
        for handler in handlers:
            merge_replies(handler, engine)
    origins = list(server.cors_origins)
    return Litestar(
        handlers,
        guards=[_guard(Authorizer(server.api_key, server.admin_api_key), lifecycle)],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
            Exception: on_error,
        },
        before_send=[add_request_id],
        cors_config=CORSConfig(allow_origins=origins) if origins else None,
        request_max_body_size=server.max_body_bytes,
        openapi_config=openapi_config(version("trunkline"), document),
        logging_config=None,
        state=State({"server": server, "lifecycle": lifecycle, "bodies": BodyLimits(server, engine.off_loop)}),
        on_app_init=[_hooked(host)],
    )


def check_routes(found: Iterable[tuple[str, Any]]) -> list[HTTPRouteHandler]:
    """The handlers of (plugin, handler) pairs.

    PluginError for a handler without scope, for two handlers with the same path and method, for declarations that
    can't be described in ``/openapi.json``, and for an unknown way to merge the replies of replicas.
    """
    owners: dict[tuple[str, str], str] = {}
    handlers = []
    for plugin, handler in found:
        if not isinstance(handler, HTTPRouteHandler):
            raise PluginError(plugin, f"a route must be a Litestar HTTP handler, not {handler!r}")
        where = " ".join([*sorted(handler.http_methods), *sorted(handler.paths)])
        if handler.opt.get("scope") not in SCOPES:
            raise PluginError(
                plugin, f'{where} declares no scope; add opt={{"scope": {" | ".join(map(repr, SCOPES))}}}'
            )
        try:
            check_declarations(handler)
        except Exception as error:  # depends on what the plugin declares
            raise PluginError(plugin, f"{where}: its opt declares what can't be described: {error}") from error
        try:
            declared(handler)
        except ValueError as error:
            raise PluginError(plugin, f"{where}: {error}") from None
        for path in handler.paths:
            for method in handler.http_methods:
                claim = (path, str(method))
                if claim in owners:
                    raise PluginError(plugin, f"{method} {path} is already a route of plugin {owners[claim]!r}")
                owners[claim] = plugin
        handlers.append(handler)
    return handlers


def _hooked(host: Host) -> Any:
    def on_app_init(config: AppConfig) -> AppConfig:
        host.app_config(config)
        return config

    return on_app_init


def _guard(authorizer: Authorizer, lifecycle: Lifecycle) -> Any:
    """A single guard, because Litestar copies the handler for each guard that it calls."""

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if connection.scope.get("method") == "OPTIONS":
            return
        scope = str(handler.opt.get("scope", "admin"))  # Litestar's own handlers may have none
        authorizer.check(connection, scope)
        if lifecycle.draining and scope == "infer":
            raise EngineDown("The server is shutting down; send the request elsewhere or later.")

    return guard
