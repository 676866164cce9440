"""Classification from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Shaper, Truncation, choose, sort_inputs

from .labels import label_of, probabilities
from .schemas import RewardParams
from .service import scores_of
from .settings import TASK

if TYPE_CHECKING:
    from trunkline.core import Engine


def classify(
    engine: Engine,
    texts: Sequence[str | Sequence[str] | Sequence[int]],
    *,
    model: str = "",
    truncate: Truncation = None,
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    """Score texts, pairs of texts or lists of token ids, all in one batch; one record each, in order.

    A record has ``scores`` (one a label, as the head gives them), ``probs``, ``label``,
    ``prompt_tokens`` and ``cached_tokens``. Raises RequestError for what the server would answer
    4xx (nothing is computed then), TimeoutError when one takes more than ``timeout`` seconds.
    """
    served = choose(engine.models, TASK, model and engine.served(model).name)
    inputs = sort_inputs(texts)
    items = Shaper(engine.tokenizer(served.name), served, truncate=truncate).items(inputs)
    tickets = [
        engine.submit(TASK, item.ids, RewardParams(), model=served.name, second_at=item.second_at) for item in items
    ]
    engine.wait_for(tickets, timeout)
    records = []
    for ticket, item in zip(tickets, items, strict=True):
        scores = scores_of(ticket.data)
        records.append({
            "scores": scores.tolist(),
            "probs": probabilities(served.info.config, scores).tolist(),
            "label": label_of(served.info.config, int(scores.argmax())),
            "prompt_tokens": len(item.ids),
            "cached_tokens": ticket.cached_tokens,
        })  # fmt: skip
    return records
