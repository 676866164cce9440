"""Merges the replies of several engine replicas as routes declare it in ``opt["replicas"]``.

A route's handler runs once for each replica, with :func:`.core.types.on_replica`, and the replies become one:

* ``"first"``: the first replica's, if no replica's is an error; else the first error, with the header ``X-Replica``
* ``"all"``: a JSON list of :class:`ReplicaResult`. Its status is 200, or the highest status of an error
* ``"sum"``: JSON in which numbers are added up; all else is the first replica's. An error as with ``"first"``
* a function ``(list[ReplicaReply]) -> Response``

``"once"`` runs the handler once, in the front. The default is ``"all"`` for routes of scope admin, else ``"once"``.
Where there are no replicas, nothing here is used.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypedDict, cast

import msgspec
from litestar import Request, Response
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from litestar.utils.scope.state import CONNECTION_STATE_KEY

from trunkline.core.client.models import ModelQuery, named_model
from trunkline.core.errors import RequestError, TrunklineError, describe_error
from trunkline.core.types import EngineClient, ReplicaReply, on_replica

from .api.bodies import AnyRequest, json_response, read_bytes
from .api.media_types import JSON

MODES = ("once", "first", "all", "sum")
REPLICA = "x-replica"  # header with the name of the replica that an error is from
BODILESS = (204, 304)  # statuses of replies that never have a body
STREAMED = (
    "This route's reply is a stream, and streams of several engine replicas can't be merged. The route must declare "
    '"replicas": "once" in its opt, and read from the replicas itself (trunkline.core.types.on_each_replica).'
)

Merge = Callable[[list[ReplicaReply]], Response[Any]]


class ReplicaResult(TypedDict):
    """A replica's reply in a list of all: JSON, or text as a string; null if it is empty."""

    replica: str
    status: int
    reply: Any


def declared(handler: HTTPRouteHandler) -> str | Merge:
    """How the replies to a handler are merged. ValueError when it declares something else."""
    given = handler.opt.get("replicas", "all" if handler.opt.get("scope") == "admin" else "once")
    if given in MODES or (callable(given) and not inspect.iscoroutinefunction(given)):
        return cast("str | Merge", given)
    modes = ", ".join(f'"{mode}"' for mode in MODES)
    raise ValueError(f"replicas must be {modes} or a function that isn't async, not {given!r}")


def merge_replies(handler: HTTPRouteHandler, engine: EngineClient) -> None:
    """Make a handler run on each of the engine's replicas, unless it declares ``"once"``."""
    mode = declared(handler)
    if mode == "once":
        return
    if mode == "all":
        handler.opt["replies"] = {200: {JSON: list[ReplicaResult]}}
    merge = MERGES[mode] if isinstance(mode, str) else mode

    def merging(app: ASGIApp) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            await _call(app, engine, merge, scope, receive, send)

        return call

    handler.middleware = [*(handler.middleware or ()), merging]


async def _call(app: ASGIApp, engine: EngineClient, merge: Merge, scope: Scope, receive: Receive, send: Send) -> None:
    """Run a route on the replicas that there are now, and send the merged reply."""
    if not engine.replicas:
        return await app(scope, receive, send)
    request: AnyRequest = Request(scope, receive, send)
    await request.route_handler.authorize_connection(request)  # before the body is read
    names = _replicas_for(request, engine)
    if not names:  # none of this model: the handler's call says so
        return await app(scope, receive, send)
    body = await read_bytes(request)
    runs = [Run(name, request, body) for name in names]
    await asyncio.gather(*(run.run(app) for run in runs))
    if any(run.streamed for run in runs):
        raise RequestError(STREAMED, status=501)
    if request.method == "HEAD":
        merge = first
    response = _checked(merge, [run.reply() for run in runs])
    asgi = response.to_asgi_response(app=None, request=request, is_head_response=request.method == "HEAD")
    await asgi(scope, receive, send)


def _replicas_for(request: AnyRequest, engine: EngineClient) -> Sequence[str]:
    """Those of the model that ``?model=`` names. Without it, of the first model or of all, as the route's query says.

    RequestError for an unknown name.
    """
    named = named_model(engine.models, request.query_params.get("model"))
    query = request.route_handler.opt.get("query")
    if named is None and isinstance(query, type) and issubclass(query, ModelQuery):
        named = engine.models[0]
    return engine.replicas if named is None else engine.replicas_of(named.name)


class Run:
    """A route's run on one replica. ``streamed``: it was ended, because its reply is a stream."""

    def __init__(self, replica: str, request: AnyRequest, body: bytes) -> None:
        """``body``: the request's, which was read already."""
        # What Litestar caches under this key belongs to one run, for example whether the response has begun.
        state = {**request.scope["state"], CONNECTION_STATE_KEY: copy(request.scope["state"][CONNECTION_STATE_KEY])}
        self.streamed = False
        self._replica = replica
        self._scope = cast("Scope", {**request.scope, "state": state})
        self._is_head = request.method == "HEAD"
        self._unread: bytes | None = body
        self._receive = request.receive
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    async def run(self, app: ASGIApp) -> None:
        with on_replica(self._replica):
            try:
                await app(self._scope, self._read, self._write)
            except Exception:
                if not self.streamed:
                    raise

    def reply(self) -> ReplicaReply:
        return ReplicaReply(self._replica, self._status, self._headers, bytes(self._body))

    async def _read(self) -> Any:
        body, self._unread = self._unread, None
        if body is None:
            return await self._receive()  # returns when the client disconnects
        return {"type": "http.request", "body": body, "more_body": False}

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]]
            self._headers = dict(pairs)
            bodiless = self._is_head or self._status in BODILESS
            if not bodiless and "content-length" not in self._headers:
                self.streamed = True
                raise StreamedReply  # the response closes its stream
        elif message["type"] == "http.response.body":
            self._body += message["body"]


class StreamedReply(Exception):
    """Ends a run."""


def _checked(merge: Merge, replies: list[ReplicaReply]) -> Response[Any]:
    """The merged reply. TrunklineError when the function fails, unless by a RequestError, or returns something else."""
    try:
        merged = merge(replies)
    except RequestError:
        raise
    except BaseException as error:
        raise TrunklineError(f"the replies of replicas can't be merged: {describe_error(error)}") from error
    if not isinstance(merged, Response):
        raise TrunklineError(f"the function that merges the replies of replicas returned no Response: {merged!r}")
    return merged


# -- kinds of merging ------------------------------------------------------------------------


def first(replies: Sequence[ReplicaReply]) -> Response[Any]:
    """The first reply if none is an error, else the first error, with the replica's name in a header."""
    failed = next((reply for reply in replies if not reply.ok), None)
    found = failed or replies[0]
    named = {REPLICA: found.replica} if failed else {}
    return Response(found.body, status_code=found.status, headers={**found.headers, **named})


def every(replies: Sequence[ReplicaReply]) -> Response[Any]:
    """A list of all replies."""
    results = [ReplicaResult(replica=one.replica, status=one.status, reply=_content(one)) for one in replies]
    worst = max(replies, key=lambda reply: reply.status)
    if worst.ok:
        return json_response(results)
    retry = {name: value for name, value in worst.headers.items() if name == "retry-after"}
    return json_response(results, worst.status, retry)


def total(replies: Sequence[ReplicaReply]) -> Response[Any]:
    """The sum of JSON replies, see :func:`added`. ValueError when they differ in more than numbers and texts."""
    if not all(reply.ok for reply in replies):
        return first(replies)
    return json_response(added([reply.json() for reply in replies]), replies[0].status)


def added(values: Sequence[Any]) -> Any:
    """The sums of numbers at the same place in JSON values of the same shape; all else is the first one's."""
    kinds = {type(value) for value in values}
    if kinds <= {int, float}:
        return sum(values)
    if kinds == {dict} and all(value.keys() == values[0].keys() for value in values):
        return {key: added([value[key] for value in values]) for key in values[0]}
    if kinds == {list} and len({len(value) for value in values}) == 1:
        return [added(items) for items in zip(*values, strict=True)]
    if kinds & {dict, list}:
        raise ValueError(f"JSON of different shapes can't be added up: {str(values)[:200]}")
    return values[0]


MERGES: dict[str, Merge] = {"first": first, "all": every, "sum": total}


def _content(reply: ReplicaReply) -> Any:
    if not reply.body:
        return None
    if reply.headers.get("content-type", "").startswith(JSON):
        return msgspec.Raw(reply.body)
    return reply.body.decode(errors="replace")
