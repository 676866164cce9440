"""Turns exceptions of transformers' model code into a ModelError that names the model and the reason."""

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

MAX_MESSAGE = 300  # characters of another library's message; the rest is cut off
BYPASSED = "transformers doesn't route its attention through a registered function, so requests can't be packed."


class UnsuitedAttention(ValueError):
    """Raised by our attention function when it is called in a way that can't work on packed rows."""


def explained(function: Callable[Concatenate[ModelSource, P], T]) -> Callable[Concatenate[ModelSource, P], T]:
    """Decorator: every exception of the function that isn't a TrunklineError becomes a ModelError.

    Its message names the model, by the function's first argument.
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
    """The reason for refusing a model whose forward raised ``error`` on inputs like those of requests."""
    if isinstance(error, UnsuitedAttention):
        return f"{error}."
    given = "padded batches of token ids" if padded else "token ids and positions alone, without a mask or a cache"
    return f"its forward doesn't run on {given} (it raised {reason_of(error)})."


def reason_of(error: Exception) -> str:
    """An exception's type and message in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + '…'}"
