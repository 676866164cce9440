"""``POST /embed``, ``POST /``, ``POST /decode`` and ``GET /info``, Text Embeddings Inference's routes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, cast

from litestar import Response, get, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    Inputs,
    ModelQuery,
    as_id_lists,
    check_tokenizer,
    check_vocabulary,
    encode_json,
    json_response,
    locate_errors,
    read_body,
    run_in_slices,
    while_connected,
)
from trunkline.core.types import ServedModel

from .body_schemas import DecodeBody, EmbedBody
from .reply_schemas import TeiInfo
from .service import EmbeddingRequest, Service
from .settings import TASK

LEFT = ("Left", "left")
POOLING = {"lasttoken": "last_token"}  # TEI's names where they aren't sentence-transformers'


def tei_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    headers = {200: {"X-Truncated-Inputs": "Number of truncated texts; missing if it is 0."}}
    replies = {"replies": list[list[float]], "reply_headers": headers}
    opt = {"scope": "infer", "dialect": "native", "body": EmbedBody, **replies}

    @post(
        ["/embed", "/"],
        opt=opt,
        status_code=200,
        summary="Embed texts, as Text Embeddings Inference does",
        description="A list of vectors. The header X-Truncated-Inputs has the number of truncated texts.",
    )
    async def embed(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, EmbedBody)
        inputs = read_inputs(body.inputs)
        embedding_request = EmbeddingRequest(
            inputs=inputs,
            model=body.model,
            prompt_name=body.prompt_name,
            truncate="start" if body.truncate is True and body.truncation_direction in LEFT else body.truncate,
            normalize=body.normalize,
            dimensions=body.dimensions,
        )
        embedded = await while_connected(request, service.embed(embedding_request))
        cut = sum(item.cut for item in embedded.items)
        headers = {"x-truncated-inputs": str(cut)} if cut else None
        written = await service.off_loop(
            len(inputs), lambda: encode_json([vector.tolist() for vector in embedded.vectors()])
        )
        return json_response(written, headers=headers)

    @post(
        "/decode",
        opt={"scope": "infer", "dialect": "native", "body": DecodeBody, "replies": list[str]},
        status_code=200,
        summary="The texts of token ids, as Text Embeddings Inference gives them",
    )
    async def decode(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, DecodeBody)
        served = service.engine.choose(TASK, body.model)
        return json_response(await decoded(service, served, body))

    @get(
        "/info",
        opt={"scope": "infer", "dialect": "native", "query": ModelQuery, "replies": TeiInfo},
        summary="An embedding model and its limits, as Text Embeddings Inference describes them",
    )
    async def info(request: AnyRequest) -> Response[Any]:
        return json_response(describe(service, service.engine.choose(TASK, request.query_params.get("model"))))

    return [embed, decode, info]


def read_inputs(given: str | list[str | int | list[int]]) -> Inputs:
    """``inputs``: a text, texts, token ids, or lists of token ids. RequestError for empty ones and mixed types."""
    if not given:
        raise RequestError("inputs cannot be empty.", param="inputs")
    if isinstance(given, str):
        return Inputs(texts=[given], single=True, field="inputs")
    texts = [entry for entry in given if isinstance(entry, str)]
    if len(texts) == len(given):
        return Inputs(texts=[*texts], field="inputs")
    if texts:
        raise RequestError("inputs mixes texts and token ids; send only texts or only token ids.", param="inputs")
    ids, single = as_id_lists(cast("list[int | list[int]]", given), "inputs")
    return Inputs(ids=ids, single=single, field="inputs")


async def decoded(service: Service, served: ServedModel, body: DecodeBody) -> list[str]:
    """The text of each list of ``ids``. RequestError for ids outside the vocabulary."""
    lists, single = as_id_lists(body.ids, "ids")
    for index, ids in enumerate(lists):
        with locate_errors("ids", index, single=single):
            check_vocabulary(ids, served, "ids")
    tokenizer = check_tokenizer(service.engine.tokenizer(served.name), served)
    skip = body.skip_special_tokens is not False

    def decode(start: int, end: int) -> list[str]:
        return [tokenizer.decode(ids, skip_special_tokens=skip) for ids in lists[start:end]]

    return await run_in_slices(service.engine, map(len, lists), decode)


def describe(service: Service, served: ServedModel) -> TeiInfo:
    """TEI's description of a model. What this server has no value for is null."""
    recipe = service.recipes.get(served)
    passes = served.chunked_prefill_size if served.chunked_prefill_size > 0 else served.max_total_tokens
    return {
        "model_id": served.model_path,
        "model_sha": None,
        "model_dtype": served.dtype,
        "model_type": {"embedding": {"pooling": "+".join(POOLING.get(mode, mode) for mode in recipe.modes)}},
        "max_concurrent_requests": service.max_queued_requests,
        "max_input_length": min(recipe.max_length or served.max_request_tokens, served.max_request_tokens),
        "max_batch_tokens": passes,
        "max_batch_requests": served.max_running_requests,
        "max_client_batch_size": service.max_batch_size,
        "auto_truncate": service.settings(served).embedding_truncate != "none",
        "tokenization_workers": 1,
        "version": version("trunkline"),
        "sha": None,
        "docker_label": None,
    }
