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
    Inputs,
    OpenAIError,
    check_characters,
    error_frame,
    json_response,
    naming,
    read_body,
    read_salt,
    spread_ids,
    spread_rids,
    sse,
)
from trunkline.core.types import ServedModel

from .body_schemas import GenerateBody
from .frames import arrivals
from .params import Sampling
from .reply_schemas import GenerateRecord
from .sequence import Sequence
from .service import Job, Service, check_prompt
from .settings import TASK


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

    return [generate]


async def _whole(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job, single = await plan(service, body)
    sequences = await service.complete(request, job)
    records = [sequence.record() for sequence in sequences]
    return json_response(records[0] if single else records)


async def _stream(service: Service, request: AnyRequest, body: GenerateBody) -> Response[Any]:
    job, single = await plan(service, body)
    sequences = await service.run(request, job)
    intervals = [sampling.stream_interval or service.settings.stream_interval for sampling in job.samplings]
    every = [intervals[index // job.n] for index in range(len(sequences))]
    return EventStream(frames(sequences, every, single=single), lambda: service.close(sequences))


def _refused(error: RequestError) -> Response[Any]:
    """SGLang answers a bad streaming request with status 200 and one error frame; its clients expect that."""

    async def only() -> AsyncIterator[bytes]:
        yield error_frame(error)
        yield DONE

    return EventStream(only(), lambda: None)


async def frames(sequences: list[Sequence], every: list[int], *, single: bool) -> AsyncIterator[bytes]:
    """Cumulative records: at tokens 1, 1 + k, 1 + 2k, … and at the end, for ``every`` k; then ``[DONE]``.

    A failure before a sequence's first token is raised, a later one is its last record.
    """
    due = [1] * len(sequences)
    async for index in arrivals([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        count = len(sequence.reply.tokens)
        if sequence.over and not count:
            sequence.check()
        if not sequence.over and count < due[index]:
            continue
        due[index] = count + every[index] - (count - 1) % every[index]
        sequence.refresh()
        record = sequence.record()
        yield sse(record if single else record | {"index": index})
    yield DONE


async def plan(service: Service, body: GenerateBody) -> tuple[Job, bool]:
    """Everything that can be wrong with a request is found here. True: the answer is one object."""
    served = service.engine.choose(TASK, body.model)
    inputs = _inputs(body)
    samplings, explicit = _samplings(service, body, len(inputs), single=inputs.single)
    n = samplings[0].n if samplings else 1
    service.check_batch(len(inputs), n)
    rids = spread_rids(body.rid, len(inputs), single=inputs.single, samples=n)
    prompts = inputs.ids or await _tokenize(service, served, inputs)
    for index, (prompt, wanted) in enumerate(zip(prompts, explicit, strict=True)):
        with naming(inputs.field, index, single=inputs.single):
            check_prompt(prompt, served)
            _check_total(len(prompt), wanted, served)
    job = Job(
        served=served,
        prompts=prompts,
        samplings=samplings,
        rids=rids,
        priority=body.priority or 0,
        salt=read_salt(body.cache_salt, body.extra_key),
        field=inputs.field,
        single=inputs.single,
    )
    return job, inputs.single and n == 1


def _inputs(body: GenerateBody) -> Inputs:
    """The body's texts or lists of token ids. Ids win over text."""
    if body.input_ids is not None:
        ids, single = spread_ids(body.input_ids)
        return Inputs(ids=ids, single=single, field="input_ids")
    if body.text is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    if isinstance(body.text, str):
        return Inputs(texts=[body.text], single=True, field="text")
    return Inputs(texts=list(body.text), field="text")


async def _tokenize(service: Service, served: ServedModel, inputs: Inputs) -> list[list[int]]:
    if service.engine.tokenizer(served.name) is None:
        raise RequestError(f"{served.name} has no tokenizer and cannot accept text prompts. Please provide input_ids.")
    texts = [str(text) for text in inputs.texts]
    for index, text in enumerate(texts):
        with naming(inputs.field, index, single=inputs.single):
            check_characters(len(text), served.info.context_length)
    prompts = await service.engine.tokenize(served.name, texts)
    for index, prompt in enumerate(prompts):
        with naming(inputs.field, index, single=inputs.single):
            if not prompt:
                raise RequestError("texts cannot be empty: tokenising gave no token.")
    return prompts


def _samplings(
    service: Service, body: GenerateBody, count: int, *, single: bool
) -> tuple[list[Sampling], list[int | None]]:
    """Sampling of each prompt, and the ``max_new_tokens`` that the request itself gave."""
    given = body.sampling_params or {}
    if isinstance(given, dict):
        sampling = service.sampling(given)
        return [sampling] * count, [_explicit(given, sampling)] * count
    if single:
        raise RequestError("sampling_params must be an object for a single prompt.", param="sampling_params")
    if len(given) != count:
        raise RequestError(
            f"sampling_params has {len(given)} entries for a batch of {count}; give one object, or one a prompt.",
            param="sampling_params",
        )
    samplings = []
    for index, params in enumerate(given):
        with naming("sampling_params", index):
            samplings.append(service.sampling(params))
    if len({sampling.n for sampling in samplings}) > 1:
        raise RequestError("The parallel_sample_num should be the same for all samples in sample params.", param="n")
    return samplings, [_explicit(params, one) for params, one in zip(given, samplings, strict=True)]


def _explicit(given: dict[str, Any], sampling: Sampling) -> int | None:
    return sampling.max_new_tokens if given.get("max_new_tokens") is not None else None


def _check_total(length: int, wanted: int | None, served: ServedModel) -> None:
    context = served.info.context_length
    if wanted is not None and length + wanted > context:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. "
            f"You requested a total of {length + wanted} tokens: {length} tokens from the input messages and "
            f"{wanted} tokens for the completion. Please reduce the number of tokens in the input messages or "
            "the completion to fit within the limit.",
            param="max_new_tokens",
        )
