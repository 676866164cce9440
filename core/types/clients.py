"""The engine client as routes and scripts see it: what they submit, and the replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from msgspec import Struct

from trunkline.core.errors import RequestError

from .models import ServedModel, Tokenizer
from .settings import Settings


class Reply(Protocol):
    """The front's one state of a submitted request; it grows until ``finish`` or ``error``.

    Producers never wait for consumers: whoever reads slowly sees several steps at once.
    """

    rid: str
    model: str  # its name when the request was submitted
    model_label: str  # the model's first name, which stays when weight updates rename the model: for metrics
    task: str
    prompt_tokens: int
    cached_tokens: int
    weight_version: str  # label of the weights that it runs with; "" until it has started
    versions: list[tuple[str, int]]  # labels that it had before (weights changed in a pause): label, output tokens then
    tokens: list[int]  # all output tokens so far
    results: list[Any]  # every ``Stage.result`` so far, in order, as builtins (``msgspec.convert`` them)
    finish: dict[str, Any] | None
    error: RequestError | None
    # Times by time.perf_counter(); all but ``created`` are 0 until they have come.
    created: float
    started: float  # left the waiting queue
    first: float  # first message with results
    latest: float  # latest message with results
    finished: float

    @property
    def data(self) -> Any:
        """The last of ``results``, or None."""

    async def wait(self) -> None:
        """Return when something arrived since the last call, or at once when it is over."""

    async def result(self) -> None:
        """Return when it is over; raise ``error`` if it has one."""

    def cancel(self) -> None:
        """Abort in the engine and free everything; harmless when it is over."""


class Submission(Struct, frozen=True, kw_only=True):
    """One sequence to run. ``params`` is the stage's params struct."""

    prompt: list[int]
    params: Any
    rid: str
    priority: int = 0
    salt: bytes = b""
    cacheable: bool = True  # False: neither reads nor fills the prefix cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins; models without token types ignore it
    embeds: bytes = b""  # float32 [len(prompt), width]: vectors in place of those of the ids, which are all 0 then
    volatile: tuple[str, ...] = ()  # fields of ``params`` that differ when a client sends the same again: random seeds


class EngineClient(Protocol):
    """What routes get: the engine, seen from the front process."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """What is loaded; the first is the primary."""

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        """The model for a request: the named one, else the first that serves the task.

        ``default``, ``unknown`` and ``dummy`` count as no name. Another unknown name means the only model that
        serves the task; RequestError with their names when several do, and when the task isn't served.
        """

    def settings(self, model: str) -> Settings:
        """All settings as they hold for a model, by the name that :meth:`choose` gives."""

    def tokenizer(self, model: str) -> Tokenizer | None:
        """The tokenizer of a model, by the name that :meth:`choose` gives; None when it has none."""

    async def tokenize(
        self, model: str, texts: Sequence[str], *, special: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        """Token ids, computed off the event loop.

        Give ``limit``, in tokens, where longer texts are of no use: RequestError 400 for one that is
        longer by far, without the time that all of it would take. What is just too long is returned.
        """

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Run CPU work of a request off the event loop.

        ``size`` is the number of characters or bytes that it works on: more than 32,768 don't hold up
        the work of other requests.
        """

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
        """Queue all or none. QueueFull when they don't fit now, RequestError when they never will."""

    def abort(self, prefix: str = "", *, everything: bool = False, model: str | None = None) -> int:
        """Abort live requests whose rid starts with ``prefix``, of one model or all; returns how many."""

    def call(self, control: str, *, model: str | None = None, **arguments: Any) -> Awaitable[Any]:
        """Run a control (hook ``controls``) in the engine between two passes."""
