"""Computes the vectors of a request; used by the routes of all dialects and from Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from trunkline.core.errors import RequestError
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
    check_vocabulary,
    item_meta,
    locate_errors,
    prepare_inputs,
    read_truncate,
    special_token_counts,
    submit_and_wait,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings, Tokenizer

from .prompts import choose_prompt, prompt_tokens, text_preprocessor
from .recipe import Recipe, read_recipe
from .schemas import EmbeddingParams, EmbeddingResult
from .settings import GROUP, TASK, EmbeddingSettings

Array = NDArray[np.float32]
ON_LOOP = 8  # vectors whose JSON is written on the event loop; more go to a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """A request in any dialect. None: the default of the model or of the server.

    ``guard_ids``: token ids may be OpenAI's, so they are checked against this model's tokenizer.
    """

    inputs: Inputs
    model: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    truncate: Truncation = None
    normalize: bool | None = None
    dimensions: int | None = None
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
        self._max_batch: int = settings["server"].max_batch_size
        self.recipes = PerModel(lambda served: read_recipe(served.info, self._settings(served)))

    def _settings(self, served: ServedModel) -> EmbeddingSettings:
        settings: EmbeddingSettings = self.engine.settings(served.name)[GROUP]
        return settings

    async def embed(self, request: EmbeddingRequest) -> EmbeddedInputs:
        """Compute the vectors. RequestError for an invalid request, before anything is computed."""
        served = self.engine.choose(TASK, request.model)
        settings = self._settings(served)
        recipe = self.recipes.get(served)
        inputs, single = request.inputs, request.inputs.single
        check_batch_size(len(inputs), self._max_batch, inputs.field)
        check_dimensions(request.dimensions, recipe)
        prompt = choose_prompt(recipe, request.prompt, request.prompt_name) if inputs.texts else ""
        truncate = settings.embedding_truncate if request.truncate is None else request.truncate
        rids = assign_rids(request.rid, len(inputs), single=single, number=False)
        if request.guard_ids:
            check_ids(inputs, served)
            if settings.embedding_ids == "check":
                check_special_tokens(inputs, self.engine.tokenizer(served.name))
        keep = await self._prompt_tokens(served, recipe, prompt, truncate)
        preprocess = text_preprocessor(self.engine.tokenizer(served.name), recipe, prompt)
        items = await prepare_inputs(
            self.engine, served, inputs, truncate=truncate, limit=recipe.max_length, prompt_tokens=keep,
            prompt_characters=len(prompt),
            preprocess=preprocess,
        )  # fmt: skip
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

    async def _prompt_tokens(self, served: ServedModel, recipe: Recipe, prompt: str, truncate: Truncation) -> int:
        """Number of tokens of the prompt, if it is needed, else 0."""
        if not prompt or (recipe.include_prompt and read_truncate(truncate) != "start"):
            return 0
        tokenizer = check_tokenizer(self.engine.tokenizer(served.name), served)  # prompts are for texts
        check_characters(len(prompt), served.max_request_tokens)
        return int(await self.engine.off_loop(prompt_tokens, tokenizer, recipe, prompt, size=len(prompt)))


def check_dimensions(dimensions: int | None, recipe: Recipe) -> None:
    """RequestError for a length to which the model's vectors can't be cut. Their full length is always allowed."""
    if dimensions is None or dimensions == recipe.dimensions:
        return
    if recipe.matryoshka is None:
        raise RequestError(
            f"dimensions must be {recipe.dimensions} or left out, got {dimensions}: the model wasn't trained for "
            "shorter vectors (Matryoshka). If it was and its config doesn't say so, start the server with "
            "--matryoshka.",
            param="dimensions",
        )
    if dimensions > recipe.dimensions:
        raise RequestError(
            f"dimensions must be at most {recipe.dimensions}, the length of the model's vectors; got {dimensions}.",
            param="dimensions",
        )
    if recipe.matryoshka and dimensions not in recipe.matryoshka:
        allowed = ", ".join(map(str, recipe.matryoshka))
        raise RequestError(f"dimensions must be one of {allowed}, got {dimensions}.", param="dimensions")


LANGCHAIN = "Send text instead (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"


def check_ids(inputs: Inputs, served: ServedModel) -> None:
    """RequestError for ids outside the vocabulary, which are from another tokenizer."""
    advice = f"Were they made with another model's tokenizer? {LANGCHAIN}, or ids of this model's tokenizer."
    for index, ids in enumerate(inputs.ids):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_vocabulary(ids, served, inputs.field, advice=advice)


def check_special_tokens(inputs: Inputs, tokenizer: Tokenizer | None) -> None:
    """RequestError for ids without the special tokens that this tokenizer adds to every text.

    Clients of OpenAI's API may send ids of OpenAI's tokenizer (LangChain does by default), most of which are in the
    vocabularies of other models, too. If the tokenizer adds no special tokens, all ids are accepted.
    """
    if tokenizer is None or not inputs.ids:
        return
    head, tail = special_tokens(cast("Hashable", tokenizer))
    for index, ids in enumerate(inputs.ids):
        if ids[: len(head)] == list(head) and ids[max(len(head), len(ids) - len(tail)) :] == list(tail):
            continue
        places = [f"begin with {tokenizer.decode(head)} {[*head]}"] if head else []
        places += [f"end with {tokenizer.decode(tail)} {[*tail]}"] if tail else []
        with locate_errors(inputs.field, index, single=inputs.single):
            raise RequestError(
                f"The token ids don't {' and '.join(places)}, as all that this model's tokenizer makes do: they seem "
                f"to be another tokenizer's. {LANGCHAIN}, or start the server with --embedding-ids trust."
            )


@lru_cache(maxsize=64)  # more models than one server has
def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer adds before and after each text."""
    head, tail = special_token_counts(tokenizer)
    ids = tokenizer.encode("a", add_special_tokens=True)
    return tuple(ids[:head]), tuple(ids[len(ids) - tail :])


def vector_of(data: Any) -> Array:
    """The float32 vector of a stage's result."""
    return np.frombuffer(msgspec.convert(data, EmbeddingResult).vector, np.dtype("<f4"))
