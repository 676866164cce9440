"""Hooks that the generation plugin specifies: other plugins change logits, or end sequences, of some requests.

An object from these hooks is asked once for each request whether it takes part; requests that it leaves alone cost
nothing. Whatever it raises ends the request that it was called for with a 500, and the log names its plugin; a
``RequestError`` is an answer to the client. After five failures in a row it is switched off: requests that it wants to
take part in get a 503 that names its plugin, until the server restarts or its weights are updated. A call that takes
more than 100 ms is logged once, because nothing else is served meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trunkline.core.hookspecs import hookspec

if TYPE_CHECKING:
    import torch

    from trunkline.core.types import Model, Request, Settings


class LogitsProcessor(Protocol):
    """Changes the logits of requests; plugins need not import this class."""

    def admit(self, request: Request) -> Any | None:
        """What ``apply`` shall get as ``state``; None: the request is left alone."""

    def apply(self, state: Any, logits: torch.Tensor, tokens: Sequence[int]) -> None:
        """Change ``logits``, float32 ``[vocab_size]``, in place; ``tokens`` is the output so far."""


class StopCondition(Protocol):
    """Ends sequences; plugins need not import this class."""

    def admit(self, request: Request) -> Any | None:
        """What ``check`` shall get as ``state``; None: the request is left alone."""

    def check(self, state: Any, token: int, text: str) -> str | None:
        """Whether ``token`` ends the sequence: what the client gets as ``matched``."""


@hookspec
def trunkline_logits_processors(model: Model, settings: Settings) -> Iterable[LogitsProcessor]:
    """Objects that change the logits of requests before the next token is chosen.

    Engine: once for each model, with its stages. Update: once, with the new model.

    ``admit(request)`` is called for each new request of the task generation. ``request.params`` has its parameters,
    ``custom_params`` (an object that the client may send) among them, and ``request.tokens`` its prompt. It returns
    None to leave the request alone, or a state of any kind. Values that a client may not send should be answered
    with a ``RequestError``, because any other exception counts as a failure. Requests are admitted again, with their
    output so far, when weights change while they wait.

    ``apply(state, logits, tokens)`` is called for each token. ``logits`` is the request's own row, float32
    ``[vocab_size]``, to be changed in place: penalties and ``logit_bias`` are in it, the temperature isn't;
    -inf forbids an id, and something finite must be left. ``tokens`` is the output so far, and must not be changed.
    A call may be repeated for the same token, and a request that was retracted goes on where it was::

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
    """Objects that say when a sequence ends.

    Engine: once for each model, with its stages. Update: once, with the new model.

    ``admit(request)`` as in ``trunkline_logits_processors``. ``check(state, token, text)`` is called once for each new
    token that ends the sequence by no stop string, expression or token: ``text`` is the output with special tokens up
    to and with ``token`` ("" for a model without tokenizer). None goes on; a string ends the sequence, with the finish
    reason ``{"type": "stop", "matched": STRING}``, and cuts nothing off the text::

        class Lines:
            def admit(self, request):
                return (request.params.custom_params or {}).get("max_lines")

            def check(self, state, token, text):
                return "max_lines" if text.count("\\n") >= state else None

        @hookimpl
        def trunkline_stop_conditions(model, settings):
            return [Lines()]
    """
