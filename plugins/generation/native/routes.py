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
from trunkline.plugins.generation.reply_schemas import GenerateRecord
from trunkline.plugins.generation.reply_updates import as_updated
from trunkline.plugins.generation.sequence import OutputSequence
from trunkline.plugins.generation.service import Service

from .body_schemas import GenerateBody
from .make_job import make_job
from .session_routes import session_routes


def generate_routes(service: Service) -> list[Any]:
    """The handlers of ``/generate`` and of sessions."""
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
            return await _complete(service, request, body)
        try:
            return await _stream(service, request, body)
        except RequestError as error:
            if error.status != 400:
                raise
            return _error_stream(error)

    return [generate, *session_routes(service.sessions)]


async def _complete(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job = await make_job(service, body)
    sequences = await while_connected(request, service.complete(job))
    records = [sequence.record() for sequence in sequences]
    return json_response(records[0] if job.one_sequence else records)


async def _stream(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job = await make_job(service, body)
    sequences = await while_connected(request, service.submit(job))
    default = service.settings(job.served).stream_interval
    intervals = [params.stream_interval or default for params in job.sampling for _ in range(job.n)]
    events = frames(service, sequences, intervals, single=job.one_sequence)
    return EventStream(events, lambda: service.close(sequences))


def _error_stream(error: RequestError) -> Response[Any]:
    """SGLang answers an invalid streaming request with status 200 and an error frame; its clients expect that."""

    async def events() -> AsyncIterator[bytes]:
        yield error_frame(error)
        yield DONE

    return EventStream(events(), lambda: None)


async def frames(
    service: Service, sequences: list[OutputSequence], intervals: list[int], *, single: bool
) -> AsyncIterator[bytes]:
    """The frames of a stream: cumulative records, then ``[DONE]``.

    With interval k, a sequence has a frame at tokens 1, 1 + k, 1 + 2k, …, and at its end. A failure before its first
    token is raised; a later one is the finish reason of its last record.
    """
    due = [1] * len(sequences)  # number of tokens at which the next frame is due
    ended: set[int] = set()  # sequences that ended while a frame was made, which is their last one then
    async for index in as_updated([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        count = len(sequence.reply.tokens)
        if index in ended:
            continue
        if sequence.finished and not count:
            sequence.raise_for_error()
        if not sequence.finished and count < due[index]:
            continue
        due[index] = count + intervals[index] - (count - 1) % intervals[index]
        await service.refresh(sequence)
        record = sequence.record()
        if sequence.finished:
            ended.add(index)
        yield event_frame(record if single else record | {"index": index})
    yield DONE
