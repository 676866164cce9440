"""An engine client of three replicas, and an application over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import ModuleType
from typing import Any

from litestar import Litestar
from msgspec import structs

from trunkline.core.config import Config
from trunkline.core.discovery import Plugin
from trunkline.core.errors import RequestError
from trunkline.core.hookspecs import hookimpl
from trunkline.core.host import Host
from trunkline.core.server.app import create_app
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.types import ModelInfo, ModelSource, ServedModel, current_replica


class Replicas:
    """An engine client of three replicas: "b" is slow, and those in ``failing`` refuse calls."""

    config: Any = None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As at the beginning."""
        info = ModelInfo(
            path="/", architecture="X", model_type="x", context_length=8, vocab_size=9, hidden_size=8, causal=True
        )
        limits: dict[str, Any] = {"max_total_tokens": 100, "max_running_requests": 4, "dtype": "float32"}
        names: dict[str, Any] = {"name": "m", "model_path": "m", "tokenizer_path": "m", "fused": ""}
        self._models = [ServedModel(info=info, tasks={}, refused={}, attention_backend="cpu", **names, **limits)]
        self.replicas: tuple[str, ...] = ("a", "b", "c")
        self.serving: dict[str, tuple[str, ...]] = {}  # model -> its replicas; by default all
        self.failing: set[str] = set()
        self.refusing: set[str] = set()  # refuse new weights
        self.values: dict[str, Any] = {"": 5, "a": 1, "b": 2, "c": 3}
        self.calls: list[tuple[str | None, str]] = []
        self.asked: list[tuple[str | None, str, str | None]] = []  # replica, control, model
        self.closed = 0

    def serve(self, **serving: tuple[str, ...]) -> None:
        """Have these models, each at some of the replicas."""
        self.serving = serving
        self._models = [structs.replace(self._models[0], name=name) for name in serving]

    @property
    def models(self) -> list[ServedModel]:
        chosen = current_replica.get()
        return [model for model in self._models if chosen is None or chosen in self.replicas_of(model.name)]

    def replicas_of(self, model: str) -> tuple[str, ...]:
        return self.serving.get(model, self.replicas)

    def settings(self, model: str) -> Any:
        return self.config.settings

    def abort(self, prefix: str = "", **_: Any) -> int:
        self.calls.append((current_replica.get(), "abort"))
        return 0

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return function(*args)

    async def call(self, control: str, **arguments: Any) -> Any:
        name = current_replica.get()
        self.calls.append((name, control))
        self.asked.append((name, control, arguments.get("model")))
        await asyncio.sleep(0.02 if name == "b" else 0)
        assert current_replica.get() == name
        if name in self.failing:
            raise RequestError(f"{name} is busy.", status=503, retry_after=7)
        if control.startswith("update_weights"):
            return {"success": name not in self.refusing, "message": name}
        if control == "commit_update":
            return {"success": True, "message": name}
        return 1000 if control == "tensor_limit" else self.values.get(name or "")


def make_app(engine: Replicas, routes: Callable[[Any, Any], list[Any]] = lambda engine, settings: []) -> Litestar:
    """Core's routes, and those of a plugin, over the replicas."""
    module: Any = ModuleType("plugin_strange")
    module.trunkline_routes = hookimpl(lambda engine, settings: routes(engine, settings))
    module.trunkline_resolve_model = hookimpl(lambda reference: ModelSource("m", "/nowhere"))
    host = Host([Plugin("strange", module.__name__, module=module)])
    config = engine.config = Config.load({"settings": {}, "models": [{"model_path": "m"}]}, host)

    def status(model: ServedModel) -> dict[str, Any]:
        running = " abc".index(current_replica.get() or " ")
        numbers = ("num_waiting_reqs", "num_used_tokens", "num_waiting_tokens", "gen_throughput", "cache_hit_rate")
        sizes = {"weight": 0, "kvcache": 0, "graph": 0}
        return dict.fromkeys(numbers, 0) | {"num_running_reqs": running, "memory_usage": sizes}

    client: Any = engine
    return create_app(
        host,
        client,
        config.settings,
        models=config.models,
        status=status,
        lifecycle=Lifecycle(),
        replicated=bool(client.replicas),
    )
