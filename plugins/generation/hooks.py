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
    import numpy as np
    import torch

    from trunkline.core.types import Model, Request, Settings

    from .schemas import Grammar


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


class SharedLimit(ValueError):
    """Something that the matchers of a compiled grammar have in common has come to its limit.

    The sequence continues once with a grammar that is compiled anew; later, this is a ``ValueError`` as any other.
    """


class GrammarMatcher(Protocol):
    """Follows one sequence through a grammar. Plugins needn't import this class.

    A ``ValueError`` of a method ends the request with a 400 that has its text, unless it is a :class:`SharedLimit`. One
    call at a time is made. After one that took more than 1 ms (for each 50,000 tokens of the vocabulary), they are made
    in a thread with low priority. The request ends when it has taken 0.5 s of CPU time beyond 5 ms for each token.
    """

    def fill(self, mask: np.ndarray) -> None:
        """Set the tokens that may come next: bit ``id % 32`` of ``mask[id // 32]``, int32 ``[ceil(vocab_size / 32)]``.

        Called in a thread, while the engine computes: it should release the GIL. For the first token, it is called once
        for all sequences, when the grammar was compiled. At least one bit must be set; an end
        token's if the text so far is complete.
        """

    def accept(self, token: int) -> None:
        """Advance by ``token``, one of the last mask."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow, or an end token was accepted. The sequence ends then."""


class CompiledGrammar(Protocol):
    """Plugins needn't import this class."""

    nbytes: int  # its memory, for the limit on grammars that are kept or in use

    def matcher(self) -> GrammarMatcher:
        """A new matcher at the start of a text. Takes well below 1 ms."""


class GrammarEngine(Protocol):
    """Compiles grammars. Plugins needn't import this class."""

    name: str  # for --grammar-backend

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile in one of two threads: bound its time and memory. ``ValueError`` with the reason if it can't be: a
        400, which is kept for the grammar. A ``RequestError`` isn't kept: for what another try may get past."""


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


@hookspec
def trunkline_grammar_engines(model: Model, settings: Settings) -> Iterable[GrammarEngine]:
    """Engines that restrict outputs to a grammar: ``json_schema``, ``regex``, ``ebnf``, ``structural_tag``.

    Engine: once for each model, with its stages. Update: once, with the new model.

    ``--grammar-backend`` chooses one by its ``name``; ``auto`` is ``llguidance``, which comes with trunkline.
    ``compile(grammar)`` is called in a thread before a request is admitted; ``grammar.kind`` is one of the four names
    (or ``lark``, for tool calls), and ``grammar.text`` what the client sent. The result is kept for later requests.
    Optional methods: ``warm_up()`` is called when the server starts; ``compile_quickly(grammar)`` in place of
    ``compile``, and returns None if that would take more than a moment: then ``compile`` is called in a third thread,
    so that other grammars needn't wait; ``cancel()``, when the server stops, lets calls in other threads fail. After a
    weight update, the output so far is given to a new matcher, of the same compiled grammar if the hook returns the
    same engine::

        import re

        class Matcher:
            def __init__(self, ids, count):
                self.ids, self.count = ids, count

            def fill(self, mask):
                words = mask.view("uint32")
                words[:] = 0
                for token in self.ids:
                    words[token // 32] |= 1 << token % 32

            def accept(self, token):
                self.count -= 1

            @property
            def finished(self):
                return self.count == 0

        class Digits:
            nbytes = 100

            def __init__(self, ids, count):
                self.ids, self.count = ids, count

            def matcher(self):
                return Matcher(self.ids, self.count)

        class DigitsEngine:
            name = "digits"

            def __init__(self, model):
                self.ids = [model.tokenizer.encode(digit)[0] for digit in "0123456789"]

            def compile(self, grammar):
                match = re.fullmatch("digits{([0-9]+)}", grammar.text)
                if grammar.kind != "regex" or match is None:
                    raise ValueError("this engine supports only the regex digits{N}")
                return Digits(self.ids, int(match[1]))

        @hookimpl
        def trunkline_grammar_engines(model, settings):
            return [DigitsEngine(model)] if model.tokenizer else []
    """
