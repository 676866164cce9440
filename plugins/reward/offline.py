"""Classification from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.server.api import Truncation, inputs_from_python

from .labels import label_of, probabilities
from .service import Service

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
    """Score texts, pairs of texts or lists of token ids. Returns one record each, in order.

    A record has ``scores`` (one per label, without activation), ``probs``, ``label``,
    ``prompt_tokens`` and ``cached_tokens``. RequestError where the server would respond with
    4xx (then nothing is computed); TimeoutError when the call takes more than ``timeout`` seconds.
    """
    work = engine.service(Service).score(
        inputs_from_python(texts), model=model and engine.served(model).name, truncate=truncate
    )
    scored = engine.run(work, timeout)
    config = scored.served.info.config
    records = []
    for scores, meta in zip(scored.scores(), scored.metas(), strict=True):
        records.append({
            "scores": scores.tolist(),
            "probs": probabilities(config, scores).tolist(),
            "label": label_of(config, int(scores.argmax())),
            "prompt_tokens": meta["prompt_tokens"],
            "cached_tokens": meta["cached_tokens"],
        })  # fmt: skip
    return records
