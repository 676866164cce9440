"""``POST /v1/chat/completions``, OpenAI's route over the same path as ``/generate``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    DONE,
    JSON,
    SSE,
    AnyRequest,
    EventStream,
    OpenAIError,
    chat_prompt,
    event_frame,
    json_response,
    new_rid,
    read_body,
    read_messages,
    read_salt,
    template_options,
    while_connected,
)
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.frames import arrivals
from trunkline.plugins.generation.reply_schemas import ChatChunk, ChatReply
from trunkline.plugins.generation.sampling.params import NO_LIMIT, Sampling
from trunkline.plugins.generation.sequence import Sequence, usage
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .chat_schemas import SAMPLING, ChatBody, StreamOptions
from .defaults import chat_defaults


def chat_routes(service: Service) -> list[Any]:
    """Handlers, bound to the service."""
    defaults = lru_cache(maxsize=64)(chat_defaults)  # more models than one server has

    replies = {JSON: ChatReply, SSE: (ChatChunk, OpenAIError)}
    opt = {"scope": "infer", "dialect": "openai", "body": ChatBody, "replies": {200: replies}}

    @post(
        "/v1/chat/completions",
        opt=opt,
        status_code=200,
        summary="OpenAI chat completions",
        operation_id="chat_completions",
    )
    async def chat_completions(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, ChatBody)
        job = await plan(service, body, defaults)
        envelope = Envelope(job.rids[0].rsplit("_", 1)[0] if job.n > 1 else job.rids[0], body.model or job.served.name)
        if not body.stream:
            return json_response(envelope.whole(await while_connected(request, service.complete(job)), job))
        sequences = await while_connected(request, service.run(job))
        frames = chunks(envelope, sequences, job, body.stream_options or StreamOptions())
        return EventStream(frames, lambda: service.close(sequences))

    return [chat_completions]


async def plan(service: Service, body: ChatBody, defaults: Callable[[str, str], dict[str, Any]]) -> Job:
    """Everything that can be wrong with a request is found here. ``defaults``: :func:`chat_defaults`."""
    served = service.engine.choose(TASK, body.model)
    messages = read_messages(body.messages)
    usual = defaults(served.info.path, service.settings(served).sampling_defaults)
    sampling, limit = _sampling(service, served, body, usual)
    service.check_batch(1, sampling.n)
    tokenizer = service.engine.tokenizer(served.name)
    if tokenizer is None:
        raise RequestError(f"{served.name} has no tokenizer; use /generate with input_ids.")
    options = template_options(
        tokenizer,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        effort=body.reasoning_effort,
    )
    context, wanted = served.info.context_length, sampling.max_new_tokens
    text = await chat_prompt(service.engine, served, tokenizer, messages, options)
    [prompt] = await service.engine.tokenize(served.name, [text], special=False, limit=context)
    check_prompt(prompt, served)
    if wanted is not None and len(prompt) + wanted > context:
        raise RequestError(
            f"{limit} is too large: {wanted}. This model's maximum context length is {context} tokens "
            f"and your messages have {len(prompt)} tokens.",
            param=limit,
        )
    rid = body.rid or f"chatcmpl-{new_rid()}"
    rids = [rid] if sampling.n == 1 else [f"{rid}_{index}" for index in range(sampling.n)]
    salts = [read_salt(body.cache_salt, body.extra_key)]
    return Job(
        served=served, prompts=[prompt], samplings=[sampling], rids=rids, priority=body.priority or 0, salts=salts
    )


def _sampling(service: Service, served: ServedModel, body: ChatBody, defaults: dict[str, Any]) -> tuple[Sampling, str]:
    """The request's sampling over the preferred parameters over the model's defaults, and its name for the limit."""
    given: dict[str, Any] = {}
    spelled = {"max_new_tokens": "max_completion_tokens"}
    for field, key in SAMPLING.items():
        if (value := getattr(body, field)) is not None:
            given[key], spelled[key] = value, field
    limit = spelled["max_new_tokens"]
    if (wanted := given.get("max_new_tokens")) is not None and wanted < 1:
        if wanted != NO_LIMIT:
            raise RequestError(f"{limit} must be at least 1, or -1 for no limit; got {wanted}.", param=limit)
        given["max_new_tokens"] = None
    merged = {**defaults, "max_new_tokens": None, **service.preferred(served), **given}
    return service.sampling(served, merged, spelled), limit


class Envelope:
    """What all chunks of one answer have in common."""

    def __init__(self, rid: str, model: str) -> None:
        self._id = rid
        self._model = model
        self._created = int(time.time())

    def whole(self, sequences: list[Sequence], job: Job) -> dict[str, Any]:
        """The answer of a request without ``stream``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sequence.text},
                "logprobs": None,
                **_ending(sequence),
            }
            for index, sequence in enumerate(sequences)
        ]
        metadata = {"weight_version": sequences[0].meta_info()["weight_version"]}
        return self._wrap("chat.completion", choices) | {"usage": usage(sequences, job.n), "metadata": metadata}

    def chunk(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        return event_frame(self._wrap("chat.completion.chunk", choices) | extra)

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


async def chunks(
    envelope: Envelope, sequences: list[Sequence], job: Job, options: StreamOptions
) -> AsyncIterator[bytes]:
    """A role, text deltas and an ending for each choice; the usage if it was asked for; ``[DONE]``."""

    def chunk(index: int, delta: dict[str, Any], **ending: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **ending}
        if not options.include_usage:
            return envelope.chunk([choice])
        so_far = usage([sequences[index]], 1) if options.continuous_usage_stats else None
        return envelope.chunk([choice], usage=so_far)

    for index in range(len(sequences)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for frame in _deltas(sequences, chunk):
        yield frame
    if options.include_usage:
        yield envelope.chunk([], usage=usage(sequences, job.n))
    yield DONE


async def _deltas(sequences: list[Sequence], chunk: Callable[..., bytes]) -> AsyncIterator[bytes]:
    """New text of each choice since its last chunk, then its ending. Raises what broke a sequence."""
    sent = [0] * len(sequences)
    async for index in arrivals([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        sequence.refresh()
        text = sequence.text or ""
        if len(text) > sent[index]:
            yield chunk(index, {"content": text[sent[index] :]})
            sent[index] = len(text)
        if sequence.over:
            sequence.check()
            yield chunk(index, {}, **_ending(sequence))


def _ending(sequence: Sequence) -> dict[str, Any]:
    finish = sequence.finish or {}
    return {"finish_reason": finish.get("type"), "matched_stop": finish.get("matched")}
