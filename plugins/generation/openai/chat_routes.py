"""``POST /v1/chat/completions``: OpenAI's route, with the same service as ``/generate``."""

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
from trunkline.plugins.generation.reply_schemas import ChatChunk, ChatReply
from trunkline.plugins.generation.reply_updates import as_updated
from trunkline.plugins.generation.sampling.params import NO_LIMIT, SamplingParams
from trunkline.plugins.generation.sequence import OutputSequence, usage
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .chat_schemas import SAMPLING, ChatBody, StreamOptions
from .defaults import chat_defaults


def chat_routes(service: Service) -> list[Any]:
    """The handler of ``/v1/chat/completions``."""
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
        job = await make_job(service, body, defaults)
        rid = job.rids[0].rsplit("_", 1)[0] if job.n > 1 else job.rids[0]
        completion = Completion(rid, body.model or job.served.name)
        if not body.stream:
            return json_response(completion.reply(await while_connected(request, service.complete(job)), job))
        sequences = await while_connected(request, service.submit(job))
        events = chunks(completion, sequences, job, body.stream_options or StreamOptions())
        return EventStream(events, lambda: service.close(sequences))

    return [chat_completions]


async def make_job(service: Service, body: ChatBody, defaults: Callable[[str, str], dict[str, Any]]) -> Job:
    """The job of a body, with its prompt as token ids. RequestError for an invalid request.

    ``defaults``: :func:`chat_defaults`, with a cache.
    """
    served = service.engine.choose(TASK, body.model)
    messages = read_messages(body.messages)
    model_defaults = defaults(served.info.path, service.settings(served).sampling_defaults)
    params, limit_field = _sampling_params(service, served, body, model_defaults)
    service.check_batch_size(1, params.n)
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
    context, max_tokens = served.info.context_length, params.max_new_tokens
    text = await chat_prompt(service.engine, served, tokenizer, messages, options)
    [prompt] = await service.engine.tokenize(served.name, [text], special=False, limit=context)
    check_prompt(prompt, served)
    if max_tokens is not None and len(prompt) + max_tokens > context:
        raise RequestError(
            f"{limit_field} is too large: {max_tokens}. This model's maximum context length is {context} tokens "
            f"and your messages have {len(prompt)} tokens.",
            param=limit_field,
        )
    rid = body.rid or f"chatcmpl-{new_rid()}"
    rids = [rid] if params.n == 1 else [f"{rid}_{index}" for index in range(params.n)]
    salts = [read_salt(body.cache_salt, body.extra_key)]
    return Job(served=served, prompts=[prompt], sampling=[params], rids=rids, priority=body.priority or 0, salts=salts)


def _sampling_params(
    service: Service, served: ServedModel, body: ChatBody, defaults: dict[str, Any]
) -> tuple[SamplingParams, str]:
    """The sampling parameters, and the field of the body that has the limit on tokens.

    The body's values override the server's preferred parameters, which override the model's defaults.
    """
    requested: dict[str, Any] = {}
    names = {"max_new_tokens": "max_completion_tokens"}
    for field, key in SAMPLING.items():
        if (value := getattr(body, field)) is not None:
            requested[key], names[key] = value, field
    limit_field = names["max_new_tokens"]
    if (limit := requested.get("max_new_tokens")) is not None and limit < 1:
        if limit != NO_LIMIT:
            raise RequestError(f"{limit_field} must be at least 1, or -1 for no limit; got {limit}.", param=limit_field)
        requested["max_new_tokens"] = None
    merged = {**defaults, "max_new_tokens": None, **service.preferred.get(served), **requested}
    return service.sampling_params(served, merged, names), limit_field


class Completion:
    """Makes the reply or the chunks of one chat completion, which have the same id, model and time."""

    def __init__(self, rid: str, model: str) -> None:
        self._id = rid
        self._model = model
        self._created = int(time.time())

    def reply(self, sequences: list[OutputSequence], job: Job) -> dict[str, Any]:
        """The reply to a request without ``stream``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sequence.text},
                "logprobs": None,
                **_finish_fields(sequence),
            }
            for index, sequence in enumerate(sequences)
        ]
        meta = sequences[0].meta_info()
        metadata = {name: meta[name] for name in ("weight_version", "weight_versions") if name in meta}
        return self._with_choices("chat.completion", choices) | {
            "usage": usage(sequences, job.n),
            "metadata": metadata,
        }

    def chunk(self, choices: list[dict[str, Any]], **fields: Any) -> bytes:
        """A frame of a stream, with further ``fields``."""
        return event_frame(self._with_choices("chat.completion.chunk", choices) | fields)

    def _with_choices(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


async def chunks(
    completion: Completion, sequences: list[OutputSequence], job: Job, options: StreamOptions
) -> AsyncIterator[bytes]:
    """The frames of a stream: role, text deltas and finish reason of each choice; usage, if requested; ``[DONE]``."""

    def chunk(index: int, delta: dict[str, Any], **finish_fields: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **finish_fields}
        if not options.include_usage:
            return completion.chunk([choice])
        usage_so_far = usage([sequences[index]], 1) if options.continuous_usage_stats else None
        return completion.chunk([choice], usage=usage_so_far)

    for index in range(len(sequences)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for frame in _deltas(sequences, chunk):
        yield frame
    if options.include_usage:
        yield completion.chunk([], usage=usage(sequences, job.n))
    yield DONE


async def _deltas(sequences: list[OutputSequence], chunk: Callable[..., bytes]) -> AsyncIterator[bytes]:
    """Each choice's new text since its last chunk, then its finish reason. Raises the error of a failed sequence."""
    sent = [0] * len(sequences)
    async for index in as_updated([sequence.reply for sequence in sequences]):
        sequence = sequences[index]
        sequence.refresh()
        text = sequence.text or ""
        if len(text) > sent[index]:
            yield chunk(index, {"content": text[sent[index] :]})
            sent[index] = len(text)
        if sequence.finished:
            sequence.raise_for_error()
            yield chunk(index, {}, **_finish_fields(sequence))


def _finish_fields(sequence: OutputSequence) -> dict[str, Any]:
    finish = sequence.finish or {}
    return {"finish_reason": finish.get("type"), "matched_stop": finish.get("matched")}
