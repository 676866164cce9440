"""``Stage``, a task's code in the engine, and the values that are passed to it and returned by it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from trunkline.core.errors import RequestError

from .requests import Needs, Request

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(slots=True)
class PartRow:
    """A request's share of one batch, as its stage sees it: positions ``[start, end)`` were computed in it.

    The stage gets hidden rows for positions ``[first, stop)`` at ``hidden[offset : offset + stop - first]``. ``stop``
    is ``end``, unless the request has ``Needs.rows_up_to``: then a final row may have no hidden rows.
    ``final``: ``end`` is the last known token, so a decoding stage may produce the next one.
    """

    request: Request
    start: int
    end: int
    first: int
    stop: int
    offset: int
    final: bool


@dataclass(slots=True)
class Part:
    """One task's rows in a batch. A request is left out if its stage gets no hidden row of it, unless it is final."""

    task: str
    rows: list[PartRow]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # set by ``prepare``, for the device
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # in ``launch``: ``arrays`` on the device
    inputs: Any = None  # passed from ``prepare`` to ``launch`` and ``collect``; stays on the host


def sequence_starts(part: Part) -> np.ndarray:
    """int64 ``[len(part.rows) + 1]``: where each request's hidden rows begin, and where the last one's end."""
    import numpy as np

    ends = [row.offset + row.stop - row.first for row in part.rows]
    return np.array([0, *ends], np.int64)


@dataclass(slots=True)
class Launched:
    """Device tensors of a part. ``next_ids``, int64 ``[len(rows)]``, are the inputs of the next decode pass."""

    next_ids: torch.Tensor | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """One result for one request, from its stage. ``finish`` (the client's finish_reason) or ``error`` ends it.

    The engine encodes it for the front. ``postponed``: there is no result, and the final row will be in a later batch
    again, as if it had not been in this one. Only for requests with ``Needs.lockstep``; the wait must be bounded.
    """

    request: Request
    tokens: tuple[int, ...] = ()  # ids in the vocabulary; none before the whole prompt is computed
    data: Any = None  # the stage's ``result`` struct
    finish: dict[str, Any] | None = None  # with a "type"
    error: RequestError | None = None
    postponed: bool = False


class Stage(ABC):
    """A task's code in the engine, one object per loaded model.

    Called by the loop in this order: ``before_admit`` and ``admit`` once (or ``adopt``, after a weight update in a
    pause); per batch ``prepare``, ``launch``, ``collect``; ``reset`` when the request was retracted;
    ``release`` exactly once per successful ``admit`` or ``adopt``; ``close`` at the end. An exception, or a wrong
    return value, in a call for one request ends only that request. When five requests in a row fail in this
    way, the task answers 503 until ``POST /plugins/NAME/enable`` or a restart. ``admit`` and ``collect``
    block all other requests: keep them well below 100 ms.
    """

    task: ClassVar[str]
    decodes: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ()  # names of the heads that it calls; a model without them doesn't serve it
    params: ClassVar[type[Struct]]
    result: ClassVar[type[Struct]]

    def before_admit(self, request: Request) -> Future[Any] | None:
        """Start slow work that the request needs, in the stage's own threads; ``admit`` is called when it has ended.

        Meanwhile the request isn't in the scheduler's queue, and other requests are served. None: nothing is needed.
        Keep the Future, in ``request.state`` or elsewhere: core doesn't read its result, so that ``admit`` raises what
        failed. It is cancelled when the request is aborted; ``release`` isn't called then. After a weight update,
        this method of the new stage is called, with another request of the same content. The number of threads, and
        the time of the work, must be bounded.
        """
        return None

    @abstractmethod
    def admit(self, request: Request) -> Needs:
        """Validate and build ``request.state``. ``RequestError`` becomes the client's 4xx."""

    def reset(self, request: Request) -> Needs | None:
        """The request was retracted, and will be recomputed from its first token that isn't cached.

        Discard state that will be recomputed. The stage gets the rows from ``Needs.rows_from`` on again. If it has
        sent results of some of these already, it returns other needs (with the same ``new_tokens``). None: no change.
        """

    def adopt(self, request: Request) -> Needs:
        """The request comes from this task's former stage: its lane was paused and got other weights.

        That stage has released it; its tokens may have output already, and ``state`` is what was left there.
        Requests with output that ran go on where they were, with the keys of the old weights; all others will be
        computed from their beginning. ``Needs.new_tokens`` must be as before. By default it is admitted like a new one.
        """
        return self.admit(request)

    def prepare(self, part: Part) -> None:
        """Host side, before the forward pass. Put what ``launch`` reads into ``part.arrays``.

        ``launch`` gets the arrays, which must be C-contiguous, as ``part.tensors``, under the same names. A tensor that
        ``launch`` itself makes of host values would make a GPU wait.
        """

    @abstractmethod
    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        """Device side. ``hidden`` is ``[R, hidden_size]``, see PartRow.

        It must not read a tensor's values, nor call anything whose result has a shape that depends on them.
        """

    @abstractmethod
    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        """Host side. ``tensors`` is ``Launched.tensors`` on the CPU, with ``"next_ids"`` added.

        A final row needs a step; no step may follow the one with ``finish`` or ``error``; a
        request has at most ``Needs.new_tokens`` output tokens. If one of these is violated, the
        request fails.
        """

    @abstractmethod
    def probe(self) -> tuple[list[int], Struct]:
        """Prompt ids and params of the smallest request: for /health_generate."""

    def warm_up(self) -> Sequence[tuple[list[int], Struct]]:
        """Prompt ids and params of requests that together run every kernel of the stage, once, when the engine starts.

        So no client waits for the compilation of a kernel. By default :meth:`probe`.
        """
        return [self.probe()]

    def release(self, request: Request) -> None:
        """The request left the engine, whatever the reason."""

    def close(self) -> None:
        """Called last: a weight update has replaced the stage or failed, or the engine stops. End threads and
        processes.

        When the engine stops, requests may still wait for what :meth:`before_admit` has started: cancel it.
        """
