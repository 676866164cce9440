"""``POST /embed``, Text Embeddings Inference's route."""

from __future__ import annotations

from typing import Any

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import AnyRequest, Inputs, encode_json, json_response, read_body, while_connected

from .body_schemas import EmbedBody
from .service import EmbeddingRequest, Service

LEFT = ("Left", "left")


def tei_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""
    headers = {200: {"X-Truncated-Inputs": "Number of truncated texts; missing if it is 0."}}
    replies = {"replies": list[list[float]], "reply_headers": headers}
    opt = {"scope": "infer", "dialect": "native", "body": EmbedBody, **replies}

    @post(
        "/embed",
        opt=opt,
        status_code=200,
        summary="Embed texts, as Text Embeddings Inference does",
        description="A list of vectors. The header X-Truncated-Inputs has the number of truncated texts.",
    )
    async def embed(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, EmbedBody)
        texts = [body.inputs] if isinstance(body.inputs, str) else list(body.inputs)
        if not texts or body.inputs == "":
            raise RequestError("inputs cannot be empty.", param="inputs")
        embedding_request = EmbeddingRequest(
            inputs=Inputs(texts=[*texts], single=isinstance(body.inputs, str), field="inputs"),
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
            len(texts), lambda: encode_json([vector.tolist() for vector in embedded.vectors()])
        )
        return json_response(written, headers=headers)

    return [embed]
