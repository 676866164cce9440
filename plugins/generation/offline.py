"""Generation from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Any, cast

from trunkline.core.server.api import choose

from .params import parse_sampling
from .sequence import Sequence
from .settings import TASK, new_token_limit

if TYPE_CHECKING:
    from trunkline.core import Engine
    from trunkline.core.types import Reply


def generate(
    engine: Engine,
    prompts: Listing[str] | Listing[Listing[int]],
    *,
    model: str = "",
    timeout: float | None = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Continue texts or lists of token ids, all in one batch; one record each, as POST /generate gives.

    ``sampling`` are the keys of its ``sampling_params``. With ``n`` > 1 a prompt's samples follow
    one another. Raises RequestError for what the server would answer 4xx, TimeoutError when a
    sequence takes more than ``timeout`` seconds.
    """
    checked = parse_sampling(sampling)
    served = choose(engine.models, TASK, model and engine.served(model).name)
    tokenizer = engine.tokenizer(served.name)
    limit = served.max_request_tokens
    wanted = limit if checked.max_new_tokens is None else checked.max_new_tokens
    sequences = []
    for prompt in prompts:
        ids = engine.encode(prompt, served.name) if isinstance(prompt, str) else list(prompt)
        seed = secrets.randbits(62) if checked.sampling_seed is None else checked.sampling_seed
        for sample in range(checked.n):
            params = checked.for_engine(new_token_limit(len(ids), wanted, limit), seed + sample)
            ticket = engine.submit(TASK, ids, params, model=served.name)
            sequences.append(
                (ticket, Sequence(cast("Reply", ticket), ids, checked, served, tokenizer))
            )  # reads no more than a ticket has
    engine.wait_for([ticket for ticket, _ in sequences], timeout)
    records = []
    for _, sequence in sequences:
        sequence.check()
        sequence.refresh()
        records.append(sequence.record())
    return records
