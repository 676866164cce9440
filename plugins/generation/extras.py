"""What a request of generation may ask for beside text: log-probabilities, hidden states, expert choices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct, structs

from trunkline.core.errors import RequestError
from trunkline.core.types import Count

from .schemas import GenerationParams, LogprobParams


class Extras(Struct, frozen=True, kw_only=True):
    """Of one prompt; the fields are those of :class:`GenerationParams`. ``text``: logprobs with their tokens' text."""

    logprobs: LogprobParams | None = None
    text: bool = False
    hidden_states: Literal["", "last", "all"] = ""
    experts_from: Count | None = None

    def added_to(self, params: GenerationParams) -> GenerationParams:
        """The engine's part of a request, with what it asks for here."""
        if self is NOTHING:
            return params
        return structs.replace(
            params, logprobs=self.logprobs, hidden_states=self.hidden_states, experts_from=self.experts_from
        )

    @property
    def of_prompt(self) -> LogprobParams | None:
        """Its ``logprobs`` if some are of the prompt."""
        return None if self.logprobs is None or self.logprobs.start is None else self.logprobs

    def without_prompt(self) -> Extras:
        """The same without log-probabilities of the prompt."""
        return structs.replace(self, logprobs=self.logprobs and structs.replace(self.logprobs, start=None))


NOTHING = Extras()


def check_asked_ids(ids: Iterable[int], vocabulary: int) -> None:
    """RequestError for ids that the logits have no column for."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {vocabulary}).",
                param="token_ids_logprob",
            )


def dense_model_error(name: str) -> RequestError:
    """The answer to who asks for the expert choices of a model that has no experts."""
    return RequestError(
        f"return_routed_experts needs a MoE model (mixture of experts), and {name} is a dense one; leave it out.",
        param="return_routed_experts",
    )
