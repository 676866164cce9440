"""Core's own routes, which every server has, whatever tasks it serves; may import all of core except the app."""

from __future__ import annotations

from collections.abc import Iterator

from litestar.handlers import HTTPRouteHandler

from trunkline.core.server.info import InfoReplies
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.types import EngineClient

from .admin import admin_routes
from .health import health_routes
from .loads import load_routes
from .maintenance import maintenance_routes
from .memory import memory_routes
from .models import model_routes
from .pause import pause_routes
from .tokenizers import tokenizer_routes


def routes(engine: EngineClient, lifecycle: Lifecycle, info: InfoReplies) -> Iterator[HTTPRouteHandler]:
    """All of them except those about weights, metrics and documentation, which the app adds itself."""
    yield from health_routes(engine, lifecycle)
    yield from model_routes(engine, info)
    yield from load_routes(engine, info)
    yield from tokenizer_routes(engine)
    yield from admin_routes(engine)
    yield from pause_routes(engine)
    yield from memory_routes(engine)
    yield from maintenance_routes(engine)
