"""Extra outputs of a generation request beside text: log-probabilities, hidden states, routed experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

from msgspec import Struct, structs

from trunkline.core.errors import RequestError
from trunkline.core.types import Count

from .schemas import GenerationParams, GenerationResult, LogprobParams


class Extras(Struct, frozen=True, kw_only=True):
    """The extra outputs that a prompt's sequences return.

    The fields are those of :class:`GenerationParams`, and ``text``: log-probabilities have the text of their tokens.
    """

    logprobs: LogprobParams | None = None
    text: bool = False
    hidden_states: Literal["", "last", "all"] = ""
    experts_from: Count | None = None

    def added_to(self, params: GenerationParams) -> GenerationParams:
        """``params`` with these extra outputs."""
        if self is NO_EXTRAS:
            return params
        return structs.replace(
            params, logprobs=self.logprobs, hidden_states=self.hidden_states, experts_from=self.experts_from
        )

    @property
    def prompt_logprobs(self) -> LogprobParams | None:
        """``logprobs`` if some are of the prompt's tokens, else None."""
        return None if self.logprobs is None or self.logprobs.start is None else self.logprobs

    def with_prompt_known(self, weights_id: int | None) -> Extras:
        """The same, for a prompt whose log-probabilities were computed with the weights of this id.

        None: they weren't computed.
        """
        return structs.replace(self, logprobs=self.logprobs and structs.replace(self.logprobs, prompt_known=weights_id))


NO_EXTRAS = Extras()


class ResultReader(Protocol):
    """Encodes the extra outputs of one sequence, in the layout of a route.

    ``cost``: the time that it takes for a byte of results, compared with that of ``/generate``'s layout.
    """

    cost: int

    def add_prompt(self, result: GenerationResult) -> None:
        """Add the log-probabilities of the prompt in a result, and nothing else of it."""

    def add(self, result: GenerationResult) -> None:
        """Add the reply's next result."""

    def finish(self) -> None:
        """All results have been added."""

    def meta(self) -> dict[str, Any]:
        """The entries of ``meta_info`` so far."""


def check_logprob_ids(ids: Iterable[int], vocab_size: int) -> None:
    """RequestError for an id outside the vocabulary, for which there is no logit."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {vocab_size}).",
                param="token_ids_logprob",
            )


def dense_model_error(name: str) -> RequestError:
    """The error for a request for routed experts to a model without experts."""
    return RequestError(
        f"return_routed_experts needs a MoE model (mixture of experts), and {name} is a dense one; leave it out.",
        param="return_routed_experts",
    )
