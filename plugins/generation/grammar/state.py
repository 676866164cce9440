"""The grammar of one sequence: its place in it, and the mask of its next token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from trunkline.core.errors import RequestError, describe_error
from trunkline.plugins.generation.hooks import GrammarMatcher, SharedLimit
from trunkline.plugins.generation.schemas import Grammar

from .kept import KeptGrammar

log = logging.getLogger("trunkline.generation")

# CPU time. A mask takes far below 1 ms for ordinary grammars.
ORDINARY_SECONDS = 0.001  # of one token; the mask of the next one has low priority if it took more
TOKEN_SECONDS = 0.005  # of one token; what exceeds it, is added up
MAX_EXCESS = 0.5  # seconds of all sequences of a request
VOCABULARY_WORDS = 1600  # of a mask for 50,000 tokens; larger ones take more time

FAILED_MESSAGE = "The grammar engine failed; the server's log has the reason."


def size_factor(words: int) -> float:
    """How much longer masks of ``words`` words take than those for an ordinary vocabulary."""
    return max(1.0, words / VOCABULARY_WORDS)


class MaskTime:
    """The CPU time that the grammar of a request takes, for all its sequences.

    ``excess``: seconds beyond those that are allowed. ``slow``: the last mask took longer than ordinary ones, so that
    the next one probably does, too.
    """

    def __init__(self) -> None:
        self.excess = 0.0
        self.slow = False


class GrammarState:
    """Follows a sequence.

    The engine's thread makes it, calls :meth:`accept` for each token and :meth:`begin` before a pass; a mask thread
    then calls :meth:`advance`, and until it is ``ready``, the engine's thread leaves the sequence alone.

    ``failure``: the error that ends the request, None if there is none. ``over``: nothing may follow the tokens so far.
    ``ready``: one of these is so, or ``mask``, int32 ``[words]``, is that of the next token. ``late``: it wasn't ready
    when the last pass needed it. ``job``: what it waits for. ``dropped``: the request has ended.
    ``complete``: no further mask is needed, only whether the sequence is ``over``.
    """

    def __init__(
        self,
        grammar: Grammar,
        kept: Future[KeptGrammar],
        renew: Callable[[KeptGrammar], Future[KeptGrammar]],
        spent: MaskTime,
        output: Sequence[int] = (),
    ) -> None:
        """``kept``: the compiled grammar, or the compilation that the sequence waits for. ``renew`` compiles it anew.
        ``output``: the tokens so far. RequestError if the grammar can't be compiled."""
        self.grammar = grammar
        self.spent = spent
        self.failure: RequestError | None = None
        self.over = self.late = self.dropped = self.complete = False
        self.mask = np.empty(0, np.int32)
        self.job: Future[Any] = kept
        # The next mask; "pending": in the hands of a mask thread. One variable, which that thread sets last: the
        # engine's thread sees no state in between.
        self._next: Literal["due", "pending", "ready"] = "due"
        self._entered: KeptGrammar | None = None  # counts this sequence as busy
        self._kept = kept
        self._renew: Callable[[KeptGrammar], Future[KeptGrammar]] | None = renew
        self._matcher: GrammarMatcher | None = None
        self._tokens = list(output)
        self._accepted = 0  # of them, by the matcher
        self._own_mask: np.ndarray | None = None
        if kept.done() and not output:
            with self._guarded(TOKEN_SECONDS):
                self._matcher = kept.result().compiled.matcher()
            if self.failure is not None:
                raise self.failure
            self.mask, self._next = kept.result().first, "ready"

    # -- the engine's thread ---------------------------------------------------------------------

    def accept(self, token: int) -> None:
        """Advance by a sampled token; sets ``failure`` if the matcher gives up.

        A mask thread does it later where it may take long, or where matchers of the same grammar are at work.
        """
        self._next = "due"
        self._tokens.append(token)
        if self._matcher is not None and not self.spent.slow and not self._kept.result().busy:
            with self._guarded(TOKEN_SECONDS):
                self._matcher.accept(token)
                self._accepted += 1

    @property
    def behind(self) -> bool:
        """Whether the last token is left to a mask thread, so that ``finished`` isn't known yet."""
        return self._accepted < len(self._tokens)

    @property
    def finished(self) -> bool:
        """Whether the grammar allows no further token. False if it isn't known yet: see ``behind`` and ``over``."""
        over = False
        if self._matcher is not None and not self.behind:
            with self._guarded(TOKEN_SECONDS):
                over = bool(self._matcher.finished)
        return over

    @property
    def ready(self) -> bool:
        return self._next == "ready"

    @property
    def idle(self) -> bool:
        """Whether :meth:`begin` is to be called."""
        return self._next == "due" and self._kept.done()

    def begin(self) -> None:
        """Give the sequence to a mask thread, which must call :meth:`advance`, or :meth:`abandon`."""
        self._next, self.job = "pending", Future()
        if self._kept.exception() is None:
            self._entered = self._kept.result()
            self._entered.enter()

    # -- a mask thread ---------------------------------------------------------------------------

    def advance(self) -> None:
        """Accept the tokens that weren't yet, and compute the mask of the next one."""
        job, ready = self.job, False
        began, steps = time.thread_time(), 1 + len(self._tokens) - self._accepted
        if not self.dropped:
            with self._guarded(TOKEN_SECONDS * steps):
                self._compute_mask(self._kept.result())
                ready = True
            self.spent.slow = time.thread_time() - began > ORDINARY_SECONDS * size_factor(len(self.mask)) * steps
        self._give_back(job, ready=ready or self.failure is not None)

    def abandon(self) -> None:
        """Instead of :meth:`advance`, if the thread has been closed."""
        self._give_back(self.job, ready=False)

    def _give_back(self, job: Future[Any], *, ready: bool) -> None:
        if self._entered is not None:
            self._entered.leave()
            self._entered = None
        self._next = "ready" if ready else "due"  # from now on, the engine's thread may go on
        job.set_result(None)

    def _compute_mask(self, kept: KeptGrammar) -> None:
        if self._matcher is None:
            self._matcher = kept.compiled.matcher()
        behind = self._tokens[self._accepted :]
        for token in behind:
            self._matcher.accept(token)
            self._accepted += 1
        if behind and self._matcher.finished:
            self.over = True
        if self.over or self.complete:
            return
        if self._own_mask is None:
            self._own_mask = np.empty_like(kept.first)
        self._matcher.fill(self._own_mask)
        self.mask = self._own_mask

    # -- errors ----------------------------------------------------------------------------------

    def no_token_error(self) -> RequestError:
        """The error for a row in which no token is left."""
        kind = self.grammar.kind
        return RequestError(
            f"{kind}: logit_bias, min_new_tokens, stop tokens or a logits processor forbid every token that the "
            "grammar allows here; the request was ended.",
            param=kind,
        )

    @contextmanager
    def _guarded(self, allowed: float) -> Iterator[None]:
        """Calls of the matcher: keep what they raise, and measure their CPU time, of which ``allowed`` seconds are."""
        began = time.thread_time()
        try:
            yield
        except RequestError as error:
            self.failure = error  # it could not be compiled anew
        except SharedLimit as error:
            self._restart(str(error))
        except ValueError as error:
            self.failure = self._ended(str(error))
        except BaseException as error:  # of a plugin, SystemExit too
            log.error("a grammar engine's matcher raised %s", describe_error(error), exc_info=error)
            self.failure = RequestError(FAILED_MESSAGE, status=500)
        self.spent.excess += max(0.0, time.thread_time() - began - allowed)
        if self.spent.excess > MAX_EXCESS and self.failure is None:
            self.failure = self._ended("it takes too much time for each token")

    def _restart(self, reason: str) -> None:
        """Follow the sequence with a newly compiled grammar, but only once."""
        if self._renew is None:
            self.failure = self._ended(reason)
            return
        self._kept = self.job = self._renew(self._kept.result())
        self._renew, self._matcher, self._accepted = None, None, 0

    def _ended(self, reason: str) -> RequestError:
        kind = self.grammar.kind
        return RequestError(f"The {kind} grammar can't be followed any further: {reason}", param=kind)
