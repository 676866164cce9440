"""A request in the engine, and its requirements for the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

if TYPE_CHECKING:
    import numpy as np


class Needs(Struct, frozen=True):
    """Requirements of a request for the scheduler, returned by ``Stage.admit``.

    ``new_tokens``: limit on output tokens; 0 reserves no slots for them.
    ``rows_from``: first position whose hidden row the stage gets; None = only the last position's.
    ``rows_up_to``: the position after the last one whose hidden row it gets, with ``rows_from``; None = no limit.
    ``reuse_up_to``: limit on prefix tokens that are taken from the cache; None = all but the last.
    ``lockstep``: the next step may be launched only after this one was collected (no overlap). Required where the
    next step's input isn't exactly the id in ``Launched.next_ids``, or depends on the tokens before it on the host.
    """

    new_tokens: Annotated[int, Meta(ge=0)] = 0
    rows_from: Annotated[int, Meta(ge=0)] | None = None  # below the prompt's length
    rows_up_to: Annotated[int, Meta(ge=1)] | None = None  # above rows_from
    reuse_up_to: Annotated[int, Meta(ge=0)] | None = None
    lockstep: bool = False

    @classmethod
    def of_rows(cls, rows: str) -> Needs:
        """The needs of a stage that pools the ``rows`` that a head takes ("first", "last" or "mean"), without output
        tokens: the last row allows cached prefixes; the others need the whole prompt to be computed."""
        return cls() if rows == "last" else cls(rows_from=0, rows_up_to=1 if rows == "first" else None, reuse_up_to=0)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence in the engine, with its state. All lengths follow from ``tokens``, ``prompt_len``, ``computed``.

    ``tokens`` = prompt, then output. Positions ``[0, computed)`` have keys and values in the
    pool; a request is decoding when exactly its last token is not computed and it has output.
    """

    key: int  # unique in the engine process
    rid: str  # the client's id
    task: str
    params: Any  # the stage's ``params`` struct
    tokens: list[int]
    prompt_len: int
    needs: Needs = field(default_factory=Needs)
    priority: int = 0
    namespace: bytes = b""  # separates cache entries (model epoch, salt)
    cacheable: bool = True  # False: neither reads nor fills the cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins: token type 1 from here on
    alone: bool = False  # computed in forward passes of its own
    embeds: np.ndarray | None = None  # float32 [prompt_len, width]: what the model gets in place of the prompt's ids
    started: float = 0.0  # first scheduled, 0 = never
    computed: int = 0
    cached: int = 0  # prompt tokens taken from the cache when first scheduled
    state: Any = None  # set and used by the stage
    schedule: Any = None  # set and used by the scheduler

    @property
    def output(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_len :]

    @property
    def output_len(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.tokens) - self.prompt_len
