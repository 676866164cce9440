"""Embedding from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Shaper, Truncation, choose, read_truncate, sort_inputs, turns

from .prompts import choose_prompt, dresser, prompt_tokens
from .recipe import read_recipe
from .schemas import EmbeddingParams
from .service import Array, check_dimensions, check_ids, vector_of
from .settings import TASK, EmbeddingSettings

if TYPE_CHECKING:
    from trunkline.core import Engine
    from trunkline.core.client.local import Ticket


def encode(
    engine: Engine,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    model: str = "",
    prompt: str | None = None,
    prompt_name: str | None = None,
    truncate: Truncation = None,
    normalize: bool | None = None,
    dimensions: int | None = None,
    timeout: float | None = None,
) -> Array:
    """Vectors of texts or lists of token ids, float32 ``[len(texts), dimensions]``.

    Options are those of ``POST /encode``. Raises RequestError for what the server would answer
    4xx, TimeoutError when an input takes more than ``timeout`` seconds.
    """
    served = choose(engine.models, TASK, model and engine.served(model).name)
    tokenizer = engine.tokenizer(served.name)
    recipe = read_recipe(served.info, EmbeddingSettings())
    check_dimensions(dimensions, recipe)
    given = sort_inputs(texts)
    if not all(isinstance(text, str) for text in given.texts):
        raise RequestError("Pairs of texts aren't embedded; join them yourself, or use a reranker.")
    check_ids(given, served)
    before, keep = choose_prompt(recipe, prompt, prompt_name) if given.texts else "", 0
    if before and tokenizer is not None and (not recipe.include_prompt or read_truncate(truncate) == "start"):
        keep = prompt_tokens(tokenizer, recipe, before)
    dress = dresser(tokenizer, recipe, before)
    shaper = Shaper(
        tokenizer, served, truncate=truncate, limit=recipe.max_length, keep=keep, lead=len(before), dress=dress
    )
    skip = 0 if recipe.include_prompt else keep
    params = EmbeddingParams(skip=skip, normalize=normalize, dimensions=dimensions)
    tickets: list[Ticket] = []
    try:
        for start, end, _ in turns(shaper.lengths(given)):  # the engine computes the first while the next are tokenised
            items = shaper.items(given, start, end)
            tickets += [engine.submit(TASK, item.ids, params, model=served.name) for item in items]
    except RequestError:
        for ticket in tickets:
            ticket.cancel()
        raise
    engine.wait_for(tickets, timeout)
    vectors = [vector_of(ticket.data) for ticket in tickets]
    return np.stack(vectors) if vectors else np.empty((0, dimensions or recipe.dimensions), np.float32)
