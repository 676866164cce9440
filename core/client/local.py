"""The engine inside the caller's process, for scripts and notebooks: no HTTP, no second process."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from trunkline.core.config import Config, ModelSettings, settings_groups
from trunkline.core.engine.channel import LocalChannel
from trunkline.core.engine.loop import EngineLoop
from trunkline.core.engine.messages import Abort, Answer, Call, Changed, Progress, Started, Stop, Submit
from trunkline.core.engine.renew import Renewer
from trunkline.core.engine.startup import build
from trunkline.core.errors import ConfigError, EngineDown, RequestError
from trunkline.core.host import Host
from trunkline.core.types import ServedModel, Tokenizer

log = logging.getLogger("trunkline.engine")


class Ticket:
    """One submitted request; fills as the engine works.

    ``tokens`` are the output so far, ``data`` the stage's last result (a dict), ``finish`` the
    finish reason once it is over; ``created`` and ``finished`` are ``time.perf_counter()``.
    """

    def __init__(self, engine: Engine, key: int, rid: str, model: str = "") -> None:
        self.rid = rid
        self.model = model
        self.weight_version = ""  # label of the weights that it runs with, known when it has started
        self.created = time.perf_counter()
        self.finished = 0.0
        self.tokens: list[int] = []
        self.data: Any = None
        self.finish: dict[str, Any] | None = None
        self.error: RequestError | None = None
        self.cached_tokens = 0
        self._engine = engine
        self._key = key
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    def result(self, timeout: float | None = None) -> Ticket:
        """Wait for the end. Raises the request's RequestError, or TimeoutError after ``timeout`` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.rid} is still running after {timeout} s")
        if self.error is not None:
            raise self.error
        return self

    def __iter__(self) -> Iterator[int]:
        """Output tokens as they come."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.done or len(self.tokens) > seen)  # noqa: B023
                fresh, over = self.tokens[seen:], self.done
            yield from fresh
            seen += len(fresh)
            if over:
                if self.error is not None:
                    raise self.error
                return

    def cancel(self) -> None:
        self._engine.post(Abort(self._key))

    def update(self, message: Any) -> None:
        """Take in a message of the engine (called on the delivery thread)."""
        with self._changed:
            if isinstance(message, Progress):
                self.tokens += message.tokens
                self.cached_tokens = message.cached
                if message.data is not None:
                    self.data = msgspec.msgpack.decode(message.data)
            elif isinstance(message, Answer):
                self.data = message.value
            if message.error is not None:
                status, text, param = message.error
                self.error = RequestError(text, status=status, param=param)
            elif isinstance(message, Answer):
                self.finish = {}
            else:
                self.finish = message.finish
            self._arrived()

    def fail(self, error: RequestError) -> None:
        """End it from outside: the engine is gone."""
        with self._changed:
            self.error = error
            self._arrived()

    def _arrived(self) -> None:
        if self.done:
            self.finished = time.perf_counter()
        self._changed.notify_all()


class Engine:
    """``Engine("path/or/hub-id", …, dtype="float32")``: the same models, stages and scheduler as
    the server, driven from Python. Keyword arguments are settings by name (``trunkline serve --help``).

    Use as a context manager, or call ``close``. When the engine is closed or breaks, requests in
    flight and all later ones fail with EngineDown.
    """

    def __init__(self, *models: str, host: Host | None = None, **options: Any) -> None:
        """``host`` brings the plugins, by default all that are installed. ConfigError, ModelError."""
        self.host = host or Host.load()
        config = configure(self.host, models, options)
        started = build(config, self.host, announce=lambda what: None)
        self._channel = LocalChannel(self._deliver)
        renewer = Renewer(started.builds, config.settings, self.host)
        self._loop = EngineLoop(started.lanes, self._channel, started.controls, renewer)
        self.models: list[ServedModel] = [lane.served for lane in started.lanes]
        self._tokenizers: dict[str, Tokenizer | None] = {
            lane.served.name: lane.model.tokenizer for lane in started.lanes
        }
        self._tickets: dict[int, Ticket] = {}
        self._keys = itertools.count(1)
        self._over: EngineDown | None = None  # why nothing runs any more
        self._ending = threading.Lock()  # held to add a ticket, and to end them all
        self._thread = threading.Thread(target=self._run, name="trunkline-engine", daemon=True)
        self._thread.start()

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
        ticket = self._ticket(rid or uuid.uuid4().hex, model)
        ids = np.asarray(prompt, np.int32).tobytes()
        raw = msgspec.Raw(msgspec.msgpack.encode(params))
        self.post(Submit(ticket._key, model, task, ticket.rid, ids, raw, priority, salt, second_at=second_at))
        return ticket

    @staticmethod
    def wait_for(tickets: Sequence[Ticket], timeout: float | None = None) -> None:
        """Wait for the end of each, at most ``timeout`` seconds for one; raise what :meth:`Ticket.result` raises.

        Then the others are cancelled.
        """
        try:
            for ticket in tickets:
                ticket.result(timeout)
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def call(self, control: str, *, model: str = "", **arguments: Any) -> Any:
        """Run a control between two batches and return its value."""
        ticket = self._ticket(control)
        self.post(Call(ticket._key, control, model, arguments))
        return ticket.result().data

    def served(self, model: str = "") -> ServedModel:
        """What is known of a model, by default the first. RequestError for an unknown name."""
        for served in self.models:
            if model in ("", served.name, *served.aliases):
                return served
        raise RequestError(f"There is no model named {model!r}; loaded: {', '.join(self._tokenizers)}.", param="model")

    def tokenizer(self, model: str = "") -> Tokenizer | None:
        return self._tokenizers[self.served(model).name]

    def encode(self, text: str, model: str = "") -> list[int]:
        """Token ids with the special tokens that the model's tokenizer adds."""
        tokenizer = self.tokenizer(model)
        if tokenizer is None:
            raise RequestError("This model has no tokenizer; give token ids.")
        return tokenizer.encode(text)

    def close(self) -> None:
        """Stop the loop after the pass that runs. Harmless when done twice."""
        self.post(Stop())
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def post(self, message: Any) -> None:
        """Hand a message to the loop."""
        self._channel.post(message)

    def _run(self) -> None:
        error = EngineDown("The engine is closed.")
        try:
            self._loop.run()
        except BaseException:  # a plugin may even try to exit
            log.exception("the engine broke")
            error = EngineDown("The engine broke; its log says why. Make a new one.")
        with self._ending:
            self._over = error
            for ticket in self._tickets.values():
                ticket.fail(error)
            self._tickets.clear()

    def _ticket(self, rid: str, model: str = "") -> Ticket:
        key = next(self._keys)
        ticket = Ticket(self, key, rid, model)
        with self._ending:
            if self._over is not None:
                raise self._over
            self._tickets[key] = ticket
        return ticket

    def _deliver(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Progress | Answer) and (ticket := self._tickets.get(message.key)):
                ticket.update(message)
                if ticket.done:
                    self._tickets.pop(message.key, None)
            elif isinstance(message, Started) and (ticket := self._tickets.get(message.key)):
                ticket.cached_tokens = message.cached
                ticket.weight_version = self.served(ticket.model).weight_version
            elif isinstance(message, Changed):
                self._rename(message.models)

    def _rename(self, models: list[ServedModel]) -> None:
        """Weights were updated. A model's tokenizer stays, whatever it is called now."""
        pairs = zip(self.models, models, strict=True)
        self._tokenizers = {new.name: self._tokenizers[old.name] for old, new in pairs}
        self.models = models


def configure(host: Host, models: tuple[str, ...], options: dict[str, Any]) -> Config:
    """A config from setting names, whichever table they belong to. ConfigError for unknown ones."""
    groups = settings_groups(host)
    tables: dict[str, dict[str, Any]] = {}
    every_model: dict[str, Any] = {}
    for name, value in options.items():
        owner = next((group for group, known in groups.items() if name in known.schema.__struct_fields__), None)
        if name in ModelSettings.__struct_fields__:
            every_model[name] = value
        elif owner is not None:
            tables.setdefault(owner, {})[name] = value
        else:
            raise ConfigError(f"Unknown setting {name!r}; `trunkline serve --help` lists them.")
    served = [{"model_path": model} | every_model for model in models]
    return Config.load({"settings": tables, "models": served}, host)
