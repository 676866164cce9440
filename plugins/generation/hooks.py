"""Hooks of the generation plugin, with which other plugins change the logits or end the sequences of requests.

For each request, each object from these hooks decides once whether it applies to the request; there is no overhead for
requests that it leaves alone. An exception ends the request that the object was called for with a 500, and the log
names its plugin; a ``RequestError`` is sent to the client. After five failures in a row the object is switched off:
requests to which it applies get a 503 that names its plugin, until the server restarts or its weights are updated. A
call that takes more than 100 ms is logged once, because it blocks all other requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trunkline.core.hookspecs import hookspec

if TYPE_CHECKING:
    import torch

    from trunkline.core.types import Model, Request, Settings


class LogitsProcessor(Protocol):
    """Changes the logits of requests. Plugins needn't import this class."""

    def admit(self, request: Request) -> Any | None:
        """The argument ``state`` of ``apply``; None leaves the request alone."""

    def apply(self, state: Any, logits: torch.Tensor, tokens: Sequence[int]) -> None:
        """Change ``logits``, float32 ``[vocab_size]``, in place. ``tokens``: the output so far."""


class StopCondition(Protocol):
    """Ends sequences. Plugins needn't import this class."""

    def admit(self, request: Request) -> Any | None:
        """The argument ``state`` of ``check``; None leaves the request alone."""

    def check(self, state: Any, token: int, text: str) -> str | None:
        """A string if ``token`` ends the sequence (the client gets it as ``matched``), else None."""


@hookspec
def trunkline_logits_processors(model: Model, settings: Settings) -> Iterable[LogitsProcessor]:
    """Objects that change the logits of requests before the next token is chosen.

    Engine: once for each model, with its stages. Update: once, with the new model.

    ``admit(request)`` is called for each new request of the generation task. ``request.params`` has its parameters,
    ``custom_params`` (an object from the client) among them; ``request.tokens`` has its prompt. It returns None to
    leave the request alone, else a state of any type. For invalid values from the client, raise a ``RequestError``:
    any other exception counts as a failure. If weights change while a request waits, it is admitted again, with its
    output so far.

    ``apply(state, logits, tokens)`` is called for each token. Change ``logits``, the request's row, float32
    ``[vocab_size]``, in place: penalties and ``logit_bias`` are applied already, the temperature isn't. -inf forbids an
    id; at least one logit must stay finite, and none may become NaN or +inf. ``tokens`` is the output so far; don't
    change it. A call may be repeated for the same token. A request that was retracted continues where it was::

        class OnlyEven:
            def admit(self, request):
                return (request.params.custom_params or {}).get("only_even") or None

            def apply(self, state, logits, tokens):
                logits[1::2] = float("-inf")

        @hookimpl
        def trunkline_logits_processors(model, settings):
            return [OnlyEven()]
    """


@hookspec
def trunkline_stop_conditions(model: Model, settings: Settings) -> Iterable[StopCondition]:
    """Objects that decide when a sequence ends.

    Engine: once for each model, with its stages. Update: once, with the new model.

    ``admit(request)`` is that of ``trunkline_logits_processors``. ``check(state, token, text)`` is called once for each
    new token, unless a stop string, expression or token ends the sequence there. ``text`` is the output including
    ``token``, with special tokens ("" for a model without tokenizer). A string ends the sequence with the finish reason
    ``{"type": "stop", "matched": STRING}``, and the text isn't cut; None continues it::

        class Lines:
            def admit(self, request):
                return (request.params.custom_params or {}).get("max_lines")

            def check(self, state, token, text):
                return "max_lines" if text.count("\\n") >= state else None

        @hookimpl
        def trunkline_stop_conditions(model, settings):
            return [Lines()]
    """
