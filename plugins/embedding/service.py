"""Computes the vectors of a request; used by the routes of all dialects and from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trunkline.core.server.api import (
    Inputs,
    ItemMeta,
    PerModel,
    PreparedInput,
    Truncation,
    assign_rids,
    check_batch_size,
    check_characters,
    check_tokenizer,
    item_meta,
    prepare_inputs,
    read_truncate,
    submit_and_wait,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings

from .length_limits import check_dimensions, check_max_tokens, check_room, limit_of
from .prompts import choose_prompt, prompt_for_input_type, prompt_tokens, text_preprocessor
from .recipe import Recipe, read_recipe
from .schemas import EmbeddingParams, EmbeddingResult
from .settings import GROUP, TASK, EmbeddingSettings
from .token_ids import check_ids, check_special_tokens

Array = NDArray[np.float32]
ON_LOOP = 8  # vectors whose JSON is written on the event loop; more go to a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """A request in any dialect. None: the default of the model or of the server.

    ``input_type``: Cohere's name for what the texts are for, which chooses a prompt in place of ``prompt`` and
    ``prompt_name``. ``max_tokens``: limit on the tokens of an input, special ones and the prompt included, beside the
    model's. ``guard_ids``: token ids may be OpenAI's, so they are checked against this model's tokenizer.
    ``dimensions_field``: the client's name of ``dimensions``, for errors.
    """

    inputs: Inputs
    model: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    input_type: str | None = None
    truncate: Truncation = None
    max_tokens: int | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    dimensions_field: str = "dimensions"
    rid: str | list[str] | None = None
    priority: int | None = None
    salt: bytes = b""
    guard_ids: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedInputs:
    """The vectors of one request, in the order of its inputs."""

    served: ServedModel
    items: list[PreparedInput]
    replies: list[Reply]

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.items)

    def vectors(self) -> list[Array]:
        return [vector_of(reply.data) for reply in self.replies]

    def metas(self) -> list[ItemMeta]:
        return [item_meta(reply, self.served, item) for reply, item in zip(self.replies, self.items, strict=True)]


class Service:
    """The embedding task in the front: chooses prompts, checks limits, tokenises, submits."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self.max_batch_size: int = settings["server"].max_batch_size
        self.max_queued_requests: int = settings["server"].max_queued_requests
        self.recipes = PerModel(lambda served: read_recipe(served.info, self.settings(served)))

    def settings(self, served: ServedModel) -> EmbeddingSettings:
        """The plugin's settings for a model."""
        settings: EmbeddingSettings = self.engine.settings(served.name)[GROUP]
        return settings

    async def embed(self, request: EmbeddingRequest) -> EmbeddedInputs:
        """Compute the vectors. RequestError for an invalid request, before anything is computed."""
        served = self.engine.choose(TASK, request.model)
        settings = self.settings(served)
        recipe = self.recipes.get(served)
        inputs, single = request.inputs, request.inputs.single
        check_batch_size(len(inputs), self.max_batch_size, inputs.field)
        check_dimensions(request.dimensions, recipe, request.dimensions_field)
        prompt = _prompt(request, recipe) if inputs.texts else ""
        truncate = settings.embedding_truncate if request.truncate is None else request.truncate
        rids = assign_rids(request.rid, len(inputs), single=single, number=False)
        if request.guard_ids:
            check_ids(inputs, served)
            if settings.embedding_ids == "check":
                check_special_tokens(inputs, self.engine.tokenizer(served.name))
        keep = await self._prompt_tokens(served, recipe, prompt, truncate, limited=request.max_tokens is not None)
        tokenizer = self.engine.tokenizer(served.name)
        if request.max_tokens is not None:
            check_room(request.max_tokens, check_tokenizer(tokenizer, served), keep)
        items = await prepare_inputs(
            self.engine, served, inputs, truncate=truncate, prompt_tokens=keep, prompt_characters=len(prompt),
            limit=limit_of(recipe, request.max_tokens, truncate),
            preprocess=text_preprocessor(tokenizer, recipe, prompt),
        )  # fmt: skip
        if request.max_tokens is not None:
            check_max_tokens(request.max_tokens, inputs, items)
        params = EmbeddingParams(
            skip=0 if recipe.include_prompt else keep, normalize=request.normalize, dimensions=request.dimensions
        )
        replies = await submit_and_wait(
            self.engine, served, TASK, items, params, rids,
            priority=request.priority or 0, salt=request.salt, single=single, field=inputs.field,
        )  # fmt: skip
        return EmbeddedInputs(served, items, replies)

    async def off_loop(self, count: int, function: Callable[[], bytes]) -> msgspec.Raw:
        """JSON of ``count`` vectors, encoded in a thread if there are many, so that other requests aren't blocked."""
        return msgspec.Raw(function() if count <= ON_LOOP else await self.engine.off_loop(function))

    async def _prompt_tokens(
        self, served: ServedModel, recipe: Recipe, prompt: str, truncate: Truncation, *, limited: bool
    ) -> int:
        """Number of tokens of the prompt, if it is needed, else 0. It is for ``limited`` inputs (``max_tokens``)."""
        if not prompt or (recipe.include_prompt and read_truncate(truncate) != "start" and not limited):
            return 0
        tokenizer = check_tokenizer(self.engine.tokenizer(served.name), served)  # prompts are for texts
        check_characters(len(prompt), served.max_request_tokens)
        return int(await self.engine.off_loop(prompt_tokens, tokenizer, recipe, prompt, size=len(prompt)))


def _prompt(request: EmbeddingRequest, recipe: Recipe) -> str:
    if request.input_type is not None:
        return prompt_for_input_type(recipe, request.input_type)
    return choose_prompt(recipe, request.prompt, request.prompt_name)


def vector_of(data: Any) -> Array:
    """The float32 vector of a stage's result."""
    return np.frombuffer(msgspec.convert(data, EmbeddingResult).vector, np.dtype("<f4"))
