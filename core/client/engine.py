"""``Engine``, the engine inside the caller's process, for scripts and notebooks: no HTTP, no second process."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from trunkline.core.config import MODEL_FIELDS, Config, settings_groups
from trunkline.core.engine.startup import build
from trunkline.core.errors import ConfigError, EngineDown, RequestError
from trunkline.core.host import Host
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings, Submission, Tokenizer

from .client import Client
from .local import CLOSED, LocalTransport

T = TypeVar("T")
UNLIMITED = 1 << 31
# Limits that protect a server from its clients are off by default for scripts.
OWN_LIMITS = {
    "max_batch_size": UNLIMITED,
    "max_queued_requests": UNLIMITED,
    "max_queued_requests_all_models": UNLIMITED,
    "max_queued_tokens": UNLIMITED,
}


class Ticket:
    """One submitted request, for code without an event loop. ``reply`` is updated while the engine runs it."""

    def __init__(self, engine: Engine, reply: Reply) -> None:
        self.reply = reply
        self._engine = engine

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the end. Raises the request's RequestError, or TimeoutError after ``timeout`` seconds."""
        if not self.done:
            self._engine.run(self.reply.result(), timeout)
        if self.reply.error is not None:
            raise self.reply.error
        return self.reply

    def __iter__(self) -> Iterator[int]:
        """Iterate over the output tokens as they arrive."""
        seen = 0
        while True:
            over = self.done
            fresh = self.reply.tokens[seen:]
            yield from fresh
            seen += len(fresh)
            if over:
                self.result()
                return
            if not fresh:
                self._engine.run(self.reply.wait())

    def cancel(self) -> None:
        """Abort the request. Does nothing when it has ended."""
        if not self.done:
            self._engine.start(_soon(self.reply.cancel))

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.reply.finish is not None or self.reply.error is not None


class Engine:
    """``Engine("path/or/hub-id", …, dtype="float32")``: the same models, stages and scheduler as
    the server, driven from Python. Keyword arguments are settings by name (``trunkline serve --help``).

    Use as a context manager, or call ``close``. When the engine is closed or breaks, requests in
    flight and all later ones fail with EngineDown.
    """

    def __init__(self, *models: str, host: Host | None = None, **options: Any) -> None:
        """``host`` has the plugins, by default all that are installed. ConfigError, ModelError."""
        self.host = host or Host.load()
        config = self.config = configure(self.host, models, OWN_LIMITS | options)
        started = build(config, self.host, announce=lambda phase: None)
        self._services: dict[type, Any] = {}
        self._open = True
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="trunkline-client", daemon=True)
        self._thread.start()

        async def connect() -> Client[LocalTransport]:
            client = Client(config, self.host, lambda *calls: LocalTransport(started, config, self.host, *calls))
            await client.start()
            return client

        try:
            self.client = self.run(connect())
        except BaseException:
            self._end_events()
            raise

    @property
    def models(self) -> Sequence[ServedModel]:
        return self.client.models

    def start(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> Future[T]:
        """Run a coroutine that uses :attr:`client`, on the client's event loop; ``timeout`` in seconds.

        EngineDown when the engine is closed.
        """
        if not self._open:
            work.close()
            raise EngineDown(CLOSED)
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout), self._events)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """As :meth:`start`, and wait for the result. After ``timeout`` seconds ``work`` is cancelled: TimeoutError."""
        future = self.start(work, timeout)
        try:
            return future.result()
        except BaseException:  # an interrupt, for example
            future.cancel()
            raise

    def service(self, kind: Callable[[EngineClient, Settings], T]) -> T:
        """The engine's instance of this class, made at the first call: for the ``offline`` modules of plugins."""
        key: Any = kind
        if key not in self._services:
            self._services[key] = kind(self.client, self.config.settings)
        service: T = self._services[key]
        return service

    def submit(
        self,
        task: str,
        prompt: list[int] | str,
        params: msgspec.Struct,
        *,
        model: str = "",
        rid: str = "",
        priority: int = 0,
        salt: bytes = b"",
        second_at: int | None = None,
    ) -> Ticket:
        """Queue one request of any task. ``prompt`` is text or token ids, ``params`` the stage's struct.

        ``second_at`` is where the second text of a pair begins, for models with token types.
        """
        if isinstance(prompt, str):
            prompt = self.encode(prompt, model)
        rid = rid or uuid.uuid4().hex
        item = Submission(prompt=prompt, params=params, rid=rid, priority=priority, salt=salt, second_at=second_at)
        [ticket] = self.submit_all(task, [item], model=model)
        return ticket

    def submit_all(self, task: str, items: Sequence[Submission], *, model: str = "") -> list[Ticket]:
        """Queue several requests of one task at once, so that they are batched from the first pass on."""
        name = self.served(model).name if self._open else ""
        return [Ticket(self, reply) for reply in self.run(_soon(self.client.submit, name, task, items))]

    def call(self, control: str, *, model: str = "", **arguments: Any) -> Any:
        """Run a control between two passes and return its value."""

        async def call() -> Any:
            return await self.client.call(control, model=model, **arguments)

        return self.run(call())

    def served(self, model: str = "") -> ServedModel:
        """The served model of this name or alias, by default the first. RequestError for an unknown name."""
        for served in self.models:
            if model in ("", served.name, *served.aliases):
                return served
        known = ", ".join(served.name for served in self.models)
        raise RequestError(f"There is no model named {model!r}; loaded: {known}.", param="model")

    def tokenizer(self, model: str = "") -> Tokenizer | None:
        return self.client.tokenizer(self.served(model).name)

    def encode(self, text: str, model: str = "") -> list[int]:
        """Token ids with the special tokens that the model's tokenizer adds."""
        tokenizer = self.tokenizer(model)
        if tokenizer is None:
            raise RequestError("This model has no tokenizer; give token ids.")
        return tokenizer.encode(text)

    def close(self) -> None:
        """Stop the engine after the running pass. Does nothing when it is closed already."""
        if not self._open:
            return
        stopping = self.start(self.client.stop(EngineDown(CLOSED)))
        self._open = False
        stopping.result()
        self._end_events()

    def _end_events(self) -> None:
        self._open = False
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _soon(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` as a coroutine."""
    return function(*arguments)


def configure(host: Host, models: tuple[str, ...], options: dict[str, Any]) -> Config:
    """A config from names of settings of all tables. ConfigError for an unknown name."""
    tables, every_model = tables_of(host, options)
    served = [{"model_path": model} | every_model for model in models]
    return Config.load({"settings": tables, "models": served}, host)


def tables_of(host: Host, options: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Settings by name as tables by group, and those of models. ConfigError for an unknown name."""
    groups = settings_groups(host)
    tables: dict[str, dict[str, Any]] = {}
    every_model: dict[str, Any] = {}
    for name, value in options.items():
        owner = next((group for group, known in groups.items() if name in known.schema.__struct_fields__), None)
        if name in MODEL_FIELDS or (owner is not None and groups[owner].per_model):
            every_model[name] = value
        elif owner is not None:
            tables.setdefault(owner, {})[name] = value
        else:
            raise ConfigError(f"Unknown setting {name!r}; `trunkline serve --help` lists them.")
    return tables, every_model
