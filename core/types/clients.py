"""The engine client for routes and scripts: submissions and replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from msgspec import Struct

from trunkline.core.errors import RequestError

from .models import ServedModel, Tokenizer
from .settings import Settings


class Reply(Protocol):
    """The state of a submitted request in the front; it is updated until ``finish`` or ``error`` is set.

    The engine doesn't wait for readers: a slow reader gets several steps at once.
    """

    rid: str
    model: str  # its name when the request was submitted
    model_label: str  # the model's first name, which weight updates don't change: for metrics
    task: str
    prompt_tokens: int
    cached_tokens: int
    weight_version: str  # label of the weights that it runs with; "" until it has started
    versions: list[tuple[str, int]]  # labels that it had before (weights changed in a pause): label, output tokens then
    tokens: list[int]  # all output tokens so far
    results: list[Any]  # every ``Stage.result`` so far, in order, as builtin types (``msgspec.convert`` them)
    finish: dict[str, Any] | None
    error: RequestError | None
    # Times by time.perf_counter(); all but ``created`` are 0 until the event happens.
    created: float
    started: float  # left the waiting queue
    first: float  # first message with results
    latest: float  # latest message with results
    finished: float

    @property
    def data(self) -> Any:
        """The last of ``results``, or None."""

    async def wait(self) -> None:
        """Return when a message has arrived since the last call, or at once when the request has ended."""

    async def begun(self) -> None:
        """Return when the request has left the waiting queue, or has ended."""

    async def result(self) -> None:
        """Return when the request has ended; raise ``error`` if it has one."""

    def cancel(self) -> None:
        """Abort the request in the engine and free its memory. Does nothing when it has ended."""


class Submission(Struct, frozen=True, kw_only=True):
    """One sequence to compute, as routes and scripts submit it. ``params`` is the stage's params struct.

    The client encodes it for the engine, which makes a :class:`Request` of it.
    """

    prompt: list[int]
    params: Any
    rid: str
    priority: int = 0
    salt: bytes = b""
    cacheable: bool = True  # False: neither reads nor fills the prefix cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins; models without token types ignore it
    embeds: bytes = b""  # float32 [len(prompt), width]: vectors in place of those of the ids, which are all 0 then
    volatile: tuple[str, ...] = ()  # fields of ``params`` that differ when a client repeats a request: random seeds


class EngineClient(Protocol):
    """The interface of the engine for routes in the front process."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """The loaded models; the first is the primary one. Those of one replica, if one is chosen (``on_replica``)."""

    @property
    def replicas(self) -> Sequence[str]:
        """Names of the engine replicas at the moment; empty on one machine, where there is only the engine."""

    def replicas_of(self, model: str) -> Sequence[str]:
        """Those of the replicas that serve a model, by one of its names."""

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        """The model for a request: the named one, else the first that serves the task.

        ``default``, ``unknown`` and ``dummy`` count as no name. If another name is unknown, the model is used that
        serves the task, if it is the only one. RequestError when several do, with their names, and when none does.
        """

    def settings(self, model: str) -> Settings:
        """All settings as they apply to a model, by the name that :meth:`choose` returns."""

    def tokenizer(self, model: str) -> Tokenizer | None:
        """The tokenizer of a model, by the name that :meth:`choose` returns; None when it has none."""

    async def tokenize(
        self, model: str, texts: Sequence[str], *, special: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        """Token ids, computed off the event loop.

        Give ``limit``, in tokens, if longer texts aren't used: a text with far more characters than ``limit`` tokens
        can have is a RequestError 400 and isn't tokenised. A text that is slightly too long is returned whole.
        """

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Run CPU work of a request off the event loop.

        ``size`` is the number of characters or bytes that it processes: above 32,768 it runs in a separate thread, so
        that it doesn't block the work of other requests.
        """

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
        """Queue all items or none. QueueFull when they don't fit now, RequestError when they exceed a limit."""

    def abort(self, prefix: str = "", *, everything: bool = False, model: str | None = None) -> int:
        """Abort live requests whose rid starts with ``prefix``, of one model or all; returns their number."""

    def call(self, control: str, *, model: str | None = None, **arguments: Any) -> Awaitable[Any]:
        """Run a control (hook ``controls``) in the engine between two passes.

        If there are several replicas and none is chosen (``on_replica``), all run it that serve ``model``, by default
        of all models. When all have answered,
        the result is the first one's answer, or the first error; ``on_each_replica`` gives all answers.
        """
