"""The stage of the embedding task: pools hidden rows, applies the modules after it, returns float32 bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import INT64_MAX, Launched, Model, Needs, Part, Request, Stage, Step

from .heads import build, normalize
from .pooling import Pooler
from .recipe import Recipe
from .schemas import EmbeddingParams, EmbeddingResult
from .settings import TASK

FINISH = {"type": "length", "length": 0}
NOT_FINITE = "The model's embedding was not finite (NaN or infinity); the request was ended."


class EmbeddingStage(Stage):
    """Computes one vector per request, when its last row is computed.

    ``request.state``: first position of a chunk -> its partial results (see :mod:`.pooling`).
    """

    task = TASK
    params = EmbeddingParams
    result = EmbeddingResult

    def __init__(self, model: Model, recipe: Recipe) -> None:
        """ModelError when weights of the recipe's modules are missing or don't fit."""
        self._recipe = recipe
        self._pooler = Pooler(recipe.modes, model.backend.pool)
        after = build(recipe.modules, model.info.hidden_size * len(recipe.modes), model.device)
        self._after, self._finish = model.backend.row_invariant(after), model.backend.row_invariant(self._cut_and_scale)

    def admit(self, request: Request) -> Needs:
        params: EmbeddingParams = request.params
        if params.skip >= request.prompt_len > 0:
            raise RequestError("Nothing is left to pool: the prompt takes all tokens of the input.", param="prompt")
        request.state = {}
        return self._pooler.needs(params.skip)

    def reset(self, request: Request) -> None:
        request.state.clear()

    def prepare(self, part: Part) -> None:
        """Arrays of the pooler; "dimensions" and "normalize" of the final rows where these differ from the recipe."""
        params: list[EmbeddingParams] = [row.request.params for row in part.rows if row.final]
        part.arrays = self._pooler.arrays(part)
        if any(each.dimensions is not None for each in params):
            part.arrays["dimensions"] = np.array([each.dimensions or INT64_MAX for each in params], np.int64)
        if any(each.normalize not in (None, self._recipe.normalize) for each in params):
            chosen = [self._recipe.normalize if each.normalize is None else each.normalize for each in params]
            part.arrays["normalize"] = np.array(chosen, np.bool_)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        vectors = self._pooler.pool(part, hidden, [row.request.params.skip for row in part.rows])
        if len(vectors):
            vectors = self._finish(self._after(vectors), part.tensors)
        return Launched(tensors={"vectors": vectors})

    def _cut_and_scale(self, vectors: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cut vectors (set the rest to zero; ``collect`` cuts the bytes) and normalise them, as each request asks."""
        if (dimensions := inputs.get("dimensions")) is not None:
            vectors = vectors * (torch.arange(vectors.shape[1], device=vectors.device) < dimensions[:, None])
        if (chosen := inputs.get("normalize")) is not None:
            return torch.where(chosen[:, None], normalize(vectors), vectors)
        return normalize(vectors) if self._recipe.normalize else vectors

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        final = [row.request for row in part.rows if row.final]
        vectors = tensors["vectors"].numpy()
        finite = np.isfinite(vectors).all(axis=-1)
        for request, vector, fine in zip(final, vectors, finite, strict=True):
            if not fine:
                yield Step(request, error=RequestError(NOT_FINITE, status=500))
                continue
            length = request.params.dimensions or len(vector)
            data = EmbeddingResult(vector[:length].astype("<f4", copy=False).tobytes())
            yield Step(request, data=data, finish=FINISH)

    def probe(self) -> tuple[list[int], EmbeddingParams]:
        return [0], EmbeddingParams()
