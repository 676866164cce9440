"""Routes that update, label and read the weights of a running server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from litestar import HttpMethod, Response, post, route
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from trunkline.core.client.models import ModelQuery, named_or_primary
from trunkline.core.engine.messages import NOT_FOUND
from trunkline.core.errors import RequestError, TrunklineError
from trunkline.core.host import Host
from trunkline.core.server.api.bodies import AnyRequest, json_response, read_body, retry_headers
from trunkline.core.server.api.fields import Ignored
from trunkline.core.server.api.reply_schemas import UpdateReply, VersionReply
from trunkline.core.server.two_phases import update_all
from trunkline.core.types import EngineClient, Settings

MAX_ROWS = 1 << 31
Path = Annotated[str, Meta(max_length=4096)]
Label = Annotated[str, Meta(max_length=256)]
Name = Annotated[str, Meta(max_length=1024)]

log = logging.getLogger("trunkline.server")


NotNeeded = Annotated[Any, Ignored("an update is always applied as a whole, between two passes")]


class UpdateBody(Struct):
    """The body of ``POST /update_weights_from_disk``."""

    model_path: Path
    load_format: Label | None = None
    abort_all_requests: bool | None = False
    weight_version: Label | None = None
    flush_cache: Annotated[
        Any, Ignored("the cache is always flushed: it belongs to the weights it was computed with")
    ] = None
    is_async: NotNeeded = None
    keep_pause: NotNeeded = None
    torch_empty_cache: NotNeeded = None
    recapture_cuda_graph: NotNeeded = None
    token_step: NotNeeded = None


class VersionBody(Struct):
    """The body of ``POST /update_weight_version``."""

    new_version: Label
    abort_all_requests: bool | None = True


class WeightsBody(Struct):
    """The body of ``/get_weights_by_name``: SGLang's fields."""

    name: Name
    truncate_size: Annotated[int, Meta(ge=0, le=MAX_ROWS)] | None = 100


def downloader(host: Host, settings: Settings) -> Callable[[str], Any] | None:
    """A function that downloads a reference if it isn't local, so that the engine doesn't wait for downloads.

    None with ``--allow-weights-dir``, which allows local folders only.
    """
    return None if settings["engine"].allow_weights_dir else host.resolve_model


def weight_routes(engine: EngineClient, download: Callable[[str], Any] | None) -> Iterator[HTTPRouteHandler]:
    """``download`` is called with each reference before the engine loads it."""
    admin: dict[str, Any] = {"scope": "admin", "replicas": "first", "query": ModelQuery}

    # Once: the front downloads the weights, then each replica loads them.
    update = admin | {
        "replicas": "once",
        "body": UpdateBody,
        "replies": {200: UpdateReply, 400: UpdateReply, 503: UpdateReply},
    }

    def model_name(request: AnyRequest) -> str:
        return named_or_primary(engine.models, request.query_params.get("model")).name

    @post(["/update_weights_from_disk", "/update_weights"], opt=update, status_code=200)
    async def update_weights(request: AnyRequest) -> Response[bytes]:
        """Serve another checkpoint of the same architecture from now on. If it can't be used, nothing changes."""
        body = await read_body(request, UpdateBody)
        model = model_name(request)
        try:
            if download is not None:
                await asyncio.to_thread(download, body.model_path)
        except (TrunklineError, OSError, ValueError, RuntimeError) as error:
            log.warning("no weights at %r: %s", body.model_path, error)
            return _refused(RequestError(NOT_FOUND.format(body.model_path)))
        arguments = {
            "model_path": body.model_path,
            "load_format": body.load_format,
            "abort_all_requests": bool(body.abort_all_requests),
            "weight_version": body.weight_version,
        }
        try:
            answer = await update_all(engine, "update_weights", model, **arguments)
        except RequestError as error:
            return _refused(error)
        return json_response(answer, 200 if answer["success"] else 400)

    @post("/update_weight_version", opt=admin | {"body": VersionBody, "replies": VersionReply}, status_code=200)
    async def update_weight_version(request: AnyRequest) -> Response[bytes]:
        """Give the weights another label, by default after aborting all requests."""
        body = await read_body(request, VersionBody)
        arguments = {"new_version": body.new_version, "abort_all_requests": body.abort_all_requests is not False}
        return json_response(await engine.call("update_weight_version", model=model_name(request), **arguments))

    methods = [HttpMethod.GET, HttpMethod.POST]
    tensor = admin | {"body": WeightsBody, "replies": (list[Any], float)}

    @route("/get_weights_by_name", http_method=methods, opt=tensor, status_code=200)
    async def get_weights_by_name(request: AnyRequest) -> Response[bytes]:
        """The first rows of a tensor, by its name in the checkpoint, with the values that are in memory now."""
        body = await read_body(request, WeightsBody)
        rows = 100 if body.truncate_size is None else body.truncate_size
        numbers = await engine.call(
            "get_weights_by_name", model=model_name(request), name=body.name, truncate_size=rows
        )
        answer: Response[bytes] = await engine.off_loop(json_response, numbers)
        return answer

    yield from (update_weights, update_weight_version, get_weights_by_name)


def _refused(error: RequestError) -> Response[bytes]:
    answer = {"success": False, "message": error.message, "num_paused_requests": 0}
    return json_response(answer, error.status, retry_headers(error))
