"""Embedding from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Truncation, inputs_from_python

from .service import Array, EmbeddingRequest, Service

if TYPE_CHECKING:
    from trunkline.core import Engine


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

    Options are those of ``POST /encode``; the engine's settings apply as in a server. RequestError where the server
    would respond with 4xx; TimeoutError when the call takes more than ``timeout`` seconds.
    """
    inputs = inputs_from_python(texts)
    if not all(isinstance(text, str) for text in inputs.texts):
        raise RequestError("Pairs of texts aren't embedded; join them yourself, or use a reranker.")
    service = engine.service(Service)
    request = EmbeddingRequest(
        inputs=inputs,
        model=model and engine.served(model).name,
        prompt=prompt,
        prompt_name=prompt_name,
        truncate=truncate,
        normalize=normalize,
        dimensions=dimensions,
    )
    embedded = engine.run(service.embed(request), timeout)
    vectors = embedded.vectors()
    width = dimensions or service.recipes.get(embedded.served).dimensions
    return np.stack(vectors) if vectors else np.empty((0, width), np.float32)
