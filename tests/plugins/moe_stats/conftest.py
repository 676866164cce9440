"""Engines on tiny mixtures of experts, and the plugin's routes over one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Litestar, Request

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import dialect_of, error_response
from trunkline.plugins.moe_stats import trunkline_routes


@pytest.fixture
def engine_of(zoo: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """``engine_of("mixtral", …, setting=value)``: an engine of the test's own, dumping to ``tmp_path / "dumps"``."""
    engines: list[Engine] = []

    def make(*names: str, **options: Any) -> Engine:
        given = {"dtype": "float32", "threads": 1, "expert_dump_dir": str(tmp_path / "dumps")} | options
        engines.append(Engine(*(str(zoo(name)) for name in names), **given))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def shared(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A mixture of experts (primary) and a dense model, for a module's tests."""
    dumps = str(tmp_path_factory.mktemp("dumps"))
    with Engine(str(zoo("mixtral")), str(zoo("llama")), dtype="float32", threads=1, expert_dump_dir=dumps) as engine:
        yield engine


class Client:
    """An EngineClient over an engine in this process."""

    replicas = ()

    def __init__(self, engine: Engine) -> None:
        self.models = engine.models
        self._engine = engine

    def replicas_of(self, model: str) -> tuple[str, ...]:
        return ()

    async def call(self, control: str, *, model: str | None = None, **arguments: Any) -> Any:
        return await asyncio.to_thread(self._engine.call, control, model=model or "", **arguments)


@pytest.fixture
async def client(shared: Engine) -> AsyncIterator[httpx.AsyncClient]:
    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error, dialect_of(request))

    handlers = [*trunkline_routes(Client(shared), {})]  # type: ignore[arg-type]
    app = Litestar(handlers, exception_handlers={RequestError: refuse})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
