"""Classification from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Inputs, Shaper, Truncation

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
    served = engine.served(model)
    inputs = _inputs(texts)
    items = Shaper(engine.tokenizer(served.name), served, truncate=truncate).items(inputs)
    tickets = [
        engine.submit(TASK, item.ids, RewardParams(), model=served.name, second_at=item.second_at) for item in items
    ]
    records = []
    for ticket, item in zip(tickets, items, strict=True):
        scores = scores_of(ticket.result(timeout).data)
        records.append({
            "scores": scores.tolist(),
            "probs": probabilities(served.info.config, scores).tolist(),
            "label": label_of(served.info.config, int(scores.argmax())),
            "prompt_tokens": len(item.ids),
            "cached_tokens": ticket.cached_tokens,
        })  # fmt: skip
    return records


def _inputs(texts: Sequence[Any]) -> Inputs:
    """Pairs are told from token ids by what they hold."""
    if all(isinstance(text, str) or all(isinstance(part, str) for part in text) for text in texts):
        return Inputs(texts=[text if isinstance(text, str) else list(text) for text in texts])
    return Inputs(ids=[list(ids) for ids in texts])
