"""Turn whatever foreign model code raises into an error that says which model can't be served, and why."""

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
NO_PASS = "without a mask and a cache of its own, its forward fails with"
BYPASSED = "transformers doesn't route its attention through a registered function, so requests can't be packed."


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
            raise ModelError(f"{source.reference} can't be served: {reason_of(error)}") from error

    return guarded


def reason_of(error: Exception) -> str:
    """An exception's kind and message in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"
