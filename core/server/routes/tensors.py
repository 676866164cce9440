"""``/update_weights_from_tensor``, and SGLang's other routes that send weights, which are refused with a reason."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypedDict

import msgspec
from litestar import Response, post
from litestar.exceptions import InternalServerException
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import named_or_primary
from trunkline.core.errors import RequestError
from trunkline.core.model.sources.catalogue import cache_folder
from trunkline.core.server.api.bodies import (
    SLOWEST_BODY,
    AnyRequest,
    ClientGone,
    json_response,
    retry_headers,
    stall_limit,
)
from trunkline.core.server.api.body_limits import InvalidBody
from trunkline.core.server.two_phases import update_all
from trunkline.core.types import EngineClient, Settings

BYTES = "application/octet-stream"
WRITE_BYTES = 1 << 20  # chunks of the body are collected up to this size for each write
PICKLED = (
    "Pickled tensors are never read: unpickling runs code that the sender chose. Send the bytes of a safetensors file "
    f"as the body (safetensors.torch.save(tensors)), with the header 'Content-Type: {BYTES}'; weight_version, "
    "abort_all_requests and model go into the query."
)
NO_GROUP = (
    "This server joins no torch.distributed process group. Send tensors to /update_weights_from_tensor as "
    "safetensors bytes, or save a checkpoint and call /update_weights_from_disk."
)
GROUP_ROUTES = (
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_ipc",
)


class TensorQuery(Struct):
    """Query parameters of ``/update_weights_from_tensor``. The prefix cache is always flushed."""

    model: Annotated[str, Meta(description="A served name or alias; by default the first model.")] = ""
    weight_version: Annotated[str, Meta(max_length=256, description="New label of the weights.")] | None = None
    abort_all_requests: Annotated[bool, Meta(description="Abort running requests instead of waiting for them.")] = False


class TensorReply(TypedDict):
    """Whether the weights were updated; if not, ``message`` says why."""

    success: bool
    message: str


def tensor_routes(engine: EngineClient, settings: Settings) -> Iterator[HTTPRouteHandler]:
    replies: dict[int, Any] = dict.fromkeys((200, 400, 413, 500, 503), TensorReply)
    opt = {"scope": "admin", "replicas": "once", "query": TensorQuery, "raw_body": BYTES, "replies": replies}
    upload_lock = asyncio.Lock()  # one upload at a time: each may be as large as a model
    allowed = settings["engine"].allow_weights_dir

    @post("/update_weights_from_tensor", opt=opt, status_code=200, request_max_body_size=None)
    async def update_weights_from_tensor(request: AnyRequest) -> Response[bytes]:
        """Replace tensors of a model by those of a safetensors file, which is the body. All others are kept."""
        media_type, _ = request.content_type
        if media_type.endswith("json"):
            return _refused(PICKLED)
        if media_type != BYTES:
            return _refused(f"The body must be the bytes of a safetensors file: set 'Content-Type: {BYTES}'.")
        if allowed is not None:
            return _refused(f"Weights come from folders below {allowed} only (--allow-weights-dir).")
        query = _query(request)
        model = named_or_primary(engine.models, query.model).name
        arguments = {"weight_version": query.weight_version, "abort_all_requests": query.abort_all_requests}
        try:
            limit = await engine.call("tensor_limit", model=model)
            async with upload_lock, saved_body(request, limit) as path:
                answer = await update_all(engine, "update_weights_from_tensor", model, path=str(path), **arguments)
        except ClientGone:
            raise
        except RequestError as error:
            return _failed(error)
        return json_response(answer, 200 if answer["success"] else 400)

    group = {"scope": "admin", "replicas": "once", "replies": {400: TensorReply}}

    @post(list(GROUP_ROUTES), opt=group, status_code=400)
    async def join_group() -> Response[bytes]:
        """Not served: weights are sent as safetensors files."""
        return _refused(NO_GROUP)

    yield from (update_weights_from_tensor, join_group)


@asynccontextmanager
async def saved_body(request: AnyRequest, limit: int) -> AsyncIterator[Path]:
    """The path of a temporary file with the body, which is deleted afterwards. ``limit``: bytes.

    RequestError when the body is too large or slow, or the file can't be written; ClientGone.
    """
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="weights-", suffix=".safetensors", dir=folder) as file:
            await _write(request, file, limit)
            yield Path(file.name)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"The tensors can't be written to {folder}: {reason}.", status=500) from error


async def _write(request: AnyRequest, file: IO[bytes], limit: int) -> None:
    _check_size(int(request.headers.get("content-length", 0)), limit)
    free, stall_seconds = shutil.disk_usage(os.path.dirname(file.name)).free, stall_limit(request)
    loop = asyncio.get_running_loop()
    total = recent = 0  # bytes; ``recent``: since the deadline was last moved
    unwritten: list[bytes] = []
    try:
        async with asyncio.timeout(stall_seconds) as deadline:
            async for chunk in request.stream():
                total += len(chunk)
                recent += len(chunk)
                _check_size(total, limit)
                if total > free:
                    raise RequestError(f"The tensors don't fit on the disk: {free} bytes were free.", status=500)
                unwritten.append(chunk)
                if sum(map(len, unwritten)) >= WRITE_BYTES:
                    await asyncio.to_thread(file.writelines, unwritten)
                    unwritten = []
                if recent >= SLOWEST_BODY * stall_seconds:
                    recent = 0
                    deadline.reschedule(loop.time() + stall_seconds)
        await asyncio.to_thread(file.writelines, unwritten)
        await asyncio.to_thread(file.flush)
    except TimeoutError:
        raise RequestError(
            f"The body arrived too slowly: less than {SLOWEST_BODY} bytes per second for {stall_seconds:g} s.",
            status=408,
        ) from None
    except InternalServerException:  # Litestar raises it when the client disconnects before the end of the body
        raise ClientGone from None


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise RequestError(
            f"The body is larger than {limit} bytes, the most that all tensors of the model can need.", status=413
        )


def _query(request: AnyRequest) -> TensorQuery:
    try:
        return msgspec.convert(dict(request.query_params), TensorQuery, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidBody(str(error)) from None


def _refused(message: str) -> Response[bytes]:
    return _failed(RequestError(message))


def _failed(error: RequestError) -> Response[bytes]:
    return json_response({"success": False, "message": error.message}, error.status, retry_headers(error))
