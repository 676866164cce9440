"""``POST|PUT /generate``, SGLang's native route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    DONE,
    JSON,
    SSE,
    AnyRequest,
    EventStream,
    OpenAIError,
    error_frame,
    event_frame,
    json_response,
    read_body,
    while_connected,
)
from trunkline.plugins.generation.frames import arrivals
from trunkline.plugins.generation.reply_schemas import GenerateRecord
from trunkline.plugins.generation.sequence import Sequence
from trunkline.plugins.generation.service import Service

from .body_schemas import GenerateBody
from .plan import plan
from .session_routes import session_routes


def generate_routes(service: Service) -> list[Any]:
    """Handlers, bound to the service."""
    replies = {JSON: (GenerateRecord, list[GenerateRecord]), SSE: (GenerateRecord, OpenAIError)}
    opt = {"scope": "infer", "dialect": "native", "body": GenerateBody, "replies": {200: replies}}

    @route(
        "/generate",
        http_method=[HttpMethod.POST, HttpMethod.PUT],
        opt=opt,
        status_code=200,
        summary="Generate text from text or token ids",
        description="In a stream each frame's text and output_ids are cumulative; the last one is `[DONE]`.",
    )
    async def generate(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, GenerateBody)
        if not body.stream:
            return await _whole(service, request, body)
        try:
            return await _stream(service, request, body)
        except RequestError as error:
            if error.status != 400:
                raise
            return _refused(error)

    return [generate, *session_routes(service.sessions)]


async def _whole(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job = await plan(service, body)
    sequences = await while_connected(request, service.complete(job))
    records = [sequence.record() for sequence in sequences]
    return json_response(records[0] if job.one_sequence else records)


async def _stream(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job = await plan(service, body)
    sequences = await while_connected(request, service.run(job))
    usual = service.settings(job.served).stream_interval
    intervals = [sampling.stream_interval or usual for sampling in job.samplings]
    every = [intervals[index // job.n] for index in range(len(sequences))]
    events = frames(service, sequences, every, single=job.one_sequence)
    return EventStream(events, lambda: service.close(sequences))


def _refused(error: RequestError) -> Response[Any]:
    """SGLang answers a bad streaming request with status 200 and one error frame; its clients expect that."""

    async def only() -> AsyncIterator[bytes]:
        yield error_frame(error)
        yield DONE

    return EventStream(only(), lambda: None)


async def frames(
    service: Service, sequences: list[Sequence], every: list[int], *, single: bool
) -> AsyncIterator[bytes]:
    """Cumulative records: at tokens 1, 1 + k, 1 + 2k, … and at the end, for ``every`` k; then ``[DONE]``.

    A failure before a sequence's first token is raised, a later one is its last record.
    """
    due = [1] * len(sequences)
    ended: set[int] = set()  # a sequence may end while its frame is made: its last frame is that one
    async for index in arrivals([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        count = len(sequence.reply.tokens)
        if index in ended:
            continue
        if sequence.over and not count:
            sequence.check()
        if not sequence.over and count < due[index]:
            continue
        due[index] = count + every[index] - (count - 1) % every[index]
        await service.refresh(sequence)
        record = sequence.record()
        if sequence.over:
            ended.add(index)
        yield event_frame(record if single else record | {"index": index})
    yield DONE
