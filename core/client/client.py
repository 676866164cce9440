"""The engine client: submit requests, abort them, call controls; the same class over both transports."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trunkline.core.config import Config
from trunkline.core.engine.messages import Abort, Answer, Call, EngineMessage, ModelsChanged, Progress, Started
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.host import Host
from trunkline.core.types import Reply, ServedModel, Settings, Submission, Tokenizer, current_replica, on_replica

from .contracts import CheckedObservers, Failures
from .models import choose_model, version_of
from .replies import NO_OBSERVERS, EngineReply, check_rids, engine_down, error_from_wire, first_answer, response_id
from .status import Status
from .suspects import CrashSuspects, died_twice
from .threads import WorkThreads
from .timeouts import Timeouts
from .tokenizers import Tokenizers, tokenize
from .transport import Deliver, Down, Transport, make_submit
from .waiting import QueueLimits, displaced

if TYPE_CHECKING:
    from .metrics import MetricsPage

T = TypeVar("T", bound=Transport)


class Client(Generic[T]):
    """Implements :class:`trunkline.core.types.EngineClient`. Must be used from a single event loop.

    A request is counted as waiting from its submission until the engine sends ``Started`` for it.
    """

    def __init__(self, config: Config, host: Host, connect: Callable[[Deliver, Down], T]) -> None:
        self._config = config
        self._host = host
        self.transport = connect(self._deliver, self._down)
        self.metrics: MetricsPage | None = None
        self._observers = NO_OBSERVERS
        self._keys = itertools.count(1)
        self._live: dict[int, EngineReply] = {}
        self._rids: set[str] = set()  # of the live requests
        self._queue_limits = QueueLimits(config.server)
        self._suspects = CrashSuspects()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._tokenizers = Tokenizers(config, host)
        self._first_names: dict[str, str] = {}  # of models that weight updates renamed
        self._outbox: list[Any] = []
        self.status = Status(self.transport, self._live, self._queue_limits.replies)
        self._timeouts = Timeouts(config.server, self._live, self._queue_limits.replies)
        self._threads = WorkThreads()

    # -- start and stop ----------------------------------------------------------------------

    async def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Start the engine. Meanwhile run ``prepare``, load the tokenizers, and get the plugins' observers and metrics.

        ModelError when the engine doesn't start or a tokenizer can't be loaded; PluginError.
        """

        def load() -> None:
            prepare()
            self._tokenizers.load()
            self._observe()

        loading = asyncio.create_task(self._threads.run(load))
        try:
            await self.transport.start()
        finally:
            await loading
        self._timeouts.start()

    async def stop(self, error: EngineDown | None = None) -> None:
        """Stop the engine. Requests and calls in flight fail, with ``error`` if given."""
        self._timeouts.stop()
        await self.transport.stop()
        self._down(error or engine_down("the server is shutting down"), [])
        self._threads.close()

    def _observe(self) -> None:
        """Register core's metrics and the plugins' observers."""
        host, settings, failures = self._host, self._config.settings, Failures()
        observers = [*host.request_observers(settings)]
        if self._config.server.enable_metrics:
            from .metrics import CoreMetrics, MetricsPage

            core = CoreMetrics(self.transport, lambda: self.status.throughput, self._first_name, failures)
            self.metrics = MetricsPage(core, host.metrics(settings), failures)
            observers += self.metrics.observers
        self._observers = CheckedObservers(observers, failures)

    # -- models ------------------------------------------------------------------------------

    @property
    def models(self) -> Sequence[ServedModel]:
        ready = self.transport.ready
        return ready.models if ready is not None else ()

    @property
    def replicas(self) -> Sequence[str]:
        return self.transport.replicas

    def replicas_of(self, model: str) -> Sequence[str]:
        return self.transport.replicas_of(model)

    def _first_name(self, model: str) -> str:
        return self._first_names.get(model, model)

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        return choose_model(self.models, task, name)

    def settings(self, model: str) -> Settings:
        with on_replica(""):  # one replica has only one of the models
            pairs = zip(self.models, self._config.models, strict=True)  # updates rename models but keep their order
        own = next(own for served, own in pairs if model in (served.name, *served.aliases))
        return self._config.settings_of(own)

    def tokenizer(self, model: str) -> Tokenizer | None:
        return self._tokenizers.get(model)  # by the name that ``choose`` gives

    async def tokenize(
        self, model: str, texts: Sequence[str], *, special: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        tokenizer = self.tokenizer(model)
        if tokenizer is None:
            raise RequestError(f"The model {model!r} has no tokenizer; send token ids instead of text.")
        return await tokenize(self, tokenizer, texts, special, limit)

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return await self._threads.run(function, *args, size=size)

    # -- requests ----------------------------------------------------------------------------

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
        self._check_up()
        check_rids([item.rid for item in items], self._rids)
        served = next((served for served in self.models if served.name == model), None)
        to_displace = self._queue_limits.make_room(served, model, items)
        messages = [
            make_submit(next(self._keys), model, task, item) for item in items
        ]  # encode all before one is queued
        ready = self._suspects.admit(messages, items)
        for reply in to_displace:
            reply.cancel_with(displaced())
        replies: list[EngineReply] = []
        for item, message in zip(items, messages, strict=True):
            reply = EngineReply(
                message.key,
                model,
                task,
                item.rid,
                len(item.prompt),
                self._abort_in_engine,
                model_label=self._first_name(model),
                observers=self._observers,
            )
            self._live[message.key] = reply
            self._rids.add(item.rid)
            replies.append(reply)
        self._queue_limits.enter(replies, max((item.priority for item in items), default=0))
        if items and response_id.get() is None:
            response_id.set(items[0].rid)
        self._post(*ready)
        for submitted in self._observers.submitted:  # last: an observer may cancel a request, which must be posted
            for reply in replies:
                submitted(reply)
        return [*replies]

    def abort(self, prefix: str = "", *, everything: bool = False, model: str | None = None) -> int:
        if not prefix and not everything:
            return 0
        label = None if model is None else self._first_name(model)
        chosen = [
            reply
            for reply in self._live.values()
            if (everything or reply.rid.startswith(prefix)) and label in (None, reply.model_label)
        ]
        for reply in chosen:
            reply.cancel()
        return len(chosen)

    def call(self, control: str, *, model: str | None = None, **arguments: Any) -> Awaitable[Any]:
        self._check_up()
        chosen = current_replica.get()
        replicas = (chosen,) if chosen else self.replicas_of(model) if model else self.replicas
        answers = [
            self._call(Call(next(self._keys), control, model or "", arguments, name)) for name in replicas or ("",)
        ]
        return answers[0] if len(answers) == 1 else asyncio.ensure_future(first_answer(answers))

    def _call(self, call: Call) -> asyncio.Future[Any]:
        self._suspects.admit_call(call)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call.key] = answer
        answer.add_done_callback(lambda _: self._calls.pop(call.key, None))
        self._post(call)
        return answer

    def _check_up(self) -> None:
        if not self.transport.up:
            raise self.transport.unavailable()

    # -- messages ----------------------------------------------------------------------------

    def _post(self, *messages: Any) -> None:
        """Send messages. All that are posted in one iteration of the event loop go into one frame."""
        if messages and not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox += messages

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        self.transport.write(messages)

    def _deliver(self, message: EngineMessage) -> None:
        if isinstance(message, Answer):
            self._suspects.ended(message.key)
            self._answer(message)
        elif isinstance(message, Started | Progress):
            if isinstance(message, Progress) and message.last:
                self._post(*self._suspects.ended(message.key, aborted=message.aborted))
            reply = self._live.get(message.key)
            if reply is None:
                return  # it was cancelled before the message arrived
            self._queue_limits.leave(reply)
            if isinstance(message, Started):
                self.status.started(reply.prompt_tokens, message.cached)
                reply.start(message, version_of(self.models, reply.model))
                return
            self.status.count(len(message.tokens))
            if message.last:
                self._forget(reply)
            reply.apply(message)
        elif isinstance(message, ModelsChanged):
            self._tokenizers.rename(message.models)
            pairs = zip(message.models, self._config.models, strict=True)
            self._first_names = {name: own.name for new, own in pairs for name in (new.name, *new.aliases)}
            for key, reply in self._live.items():
                if message.keys is None or key in message.keys:
                    reply.relabel(version_of(self.models, reply.model))

    def _answer(self, message: Answer) -> None:
        waiter = self._calls.get(message.key)
        if waiter is None or waiter.done():
            return
        if message.error is not None:
            waiter.set_exception(error_from_wire(message.error))
        else:
            waiter.set_result(message.value)

    def _abort_in_engine(self, reply: EngineReply) -> None:
        """Remove a live request here and abort it in the engine. The caller sets the reply's state."""
        if reply.key in self._live:
            self._forget(reply)
            self._queue_limits.leave(reply)
            self._suspects.dropped(reply.key)
            self._post(Abort(reply.key))

    def _forget(self, reply: EngineReply) -> None:
        del self._live[reply.key]
        self._rids.discard(reply.rid)

    def _down(self, error: EngineDown, working_on: Iterable[int], lost: Collection[int] | None = None) -> None:
        """Requests and calls fail, because their engine was lost while it ran those of ``working_on``.

        ``lost``: their keys; by default all that are in flight.
        """
        refused = self._suspects.engine_died(working_on)
        if lost is None:
            lost = [*self._live, *self._calls]
            self._suspects.clear()
            self._outbox.clear()
        replies = [reply for key in lost if (reply := self._live.get(key)) is not None]
        for reply in replies:  # all are gone before one of them is told
            self._forget(reply)
            self._queue_limits.leave(reply)
        for key in lost:
            self._post(*self._suspects.ended(key, aborted=True))
        for reply in replies:
            reply.fail(died_twice() if reply.key in refused else error)
        for key in lost:
            call = self._calls.get(key)
            if call is not None and not call.done():
                call.set_exception(died_twice() if key in refused else error)
                call.exception()  # marks it as retrieved: asyncio logs unretrieved ones, and the caller may be gone
