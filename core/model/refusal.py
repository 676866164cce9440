"""Turns exceptions of foreign model code into an error that says which model can't be served, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from trunkline.core.errors import ModelError, TrunklineError

if TYPE_CHECKING:
    from trunkline.core.types import ModelSource

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("trunkline.model")

LONGEST = 300  # characters of another library's message
BYPASSED = "transformers doesn't route its attention through a registered function, so requests can't be packed."


class UnsuitedAttention(ValueError):
    """Raised by our attention function for calls that packed requests don't allow; the message says which."""


def explained(function: Callable[Concatenate[ModelSource, P], T]) -> Callable[Concatenate[ModelSource, P], T]:
    """A decorator: every exception of the function that isn't one of ours becomes a ModelError.

    Its message names the model by its source, the function's first argument.
    """

    @wraps(function)
    def guarded(source: ModelSource, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(source, *args, **kwargs)
        except TrunklineError:
            raise
        except Exception as error:
            log.debug("%s: %s failed", source.reference, function.__name__, exc_info=True)
            raise ModelError(
                f"{source.reference} can't be served: its files or its class aren't what trunkline expects "
                f"({reason_of(error)})."
            ) from error

    return guarded


def failed_pass(error: Exception, *, padded: bool = False) -> str:
    """The sentence against a model whose forward raised ``error`` on the inputs that requests would give it."""
    if isinstance(error, UnsuitedAttention):
        return f"{error}."
    given = "padded batches of token ids" if padded else "token ids and positions alone, without a mask or a cache"
    return f"its forward doesn't run on {given} (it raised {reason_of(error)})."


def reason_of(error: Exception) -> str:
    """An exception's kind and message in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"
