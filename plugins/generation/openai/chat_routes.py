"""``POST /v1/chat/completions``: OpenAI's route, with the same service as ``/generate``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    JSON,
    SSE,
    AnyRequest,
    OpenAIError,
    chat_prompt,
    new_rid,
    read_body,
    read_messages,
    read_salt,
    template_options,
)
from trunkline.core.types import ServedModel, Tokenizer
from trunkline.plugins.generation.extras import Extras
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.schemas import LogprobParams
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .chat_replies import ChatReplies
from .chat_schemas import ChatBody
from .defaults import chat_defaults
from .replies import request_ids
from .reply_schemas import ChatChunk, ChatReply
from .sampling import check_total, sampling_params
from .token_logprobs import ChatLogprobs, check_count, read_logprobs


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
        rid = body.rid or f"chatcmpl-{new_rid()}"
        job = await make_job(service, body, rid, defaults)
        response: Response[Any] = await ChatReplies(service, job, body, rid).response(request)
        return response

    return [chat_completions]


async def make_job(service: Service, body: ChatBody, rid: str, defaults: Callable[[str, str], dict[str, Any]]) -> Job:
    """The job of a body, with its prompt as token ids. RequestError for an invalid request.

    ``defaults``: :func:`chat_defaults`, with a cache.
    """
    served = service.engine.choose(TASK, body.model)
    messages = read_messages(body.messages)
    model_defaults = defaults(served.info.path, service.settings(served).sampling_defaults)
    params, limit_field = sampling_params(service, served, body, {**model_defaults, "max_new_tokens": None})
    logprobs = _logprobs(body)
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
    text = await chat_prompt(service.engine, served, tokenizer, messages, options)
    [prompt] = await service.engine.tokenize(served.name, [text], special=False, limit=served.info.context_length)
    check_prompt(prompt, served)
    check_total(len(prompt), params, served, limit_field, "messages have")
    return Job(
        served=served,
        prompts=[prompt],
        sampling=[params],
        rids=request_ids(rid, params.n),
        priority=body.priority or 0,
        salts=[read_salt(body.cache_salt, body.extra_key)],
        **({} if logprobs is None else _logprob_outputs(logprobs, body, served, prompt, params)),
    )


def _logprobs(body: ChatBody) -> LogprobParams | None:
    """The log-probabilities that a body requests."""
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs; set it to true.", param="top_logprobs")
        return None
    return read_logprobs(body.top_logprobs or 0, None, "top_logprobs")


def _logprob_outputs(
    logprobs: LogprobParams, body: ChatBody, served: ServedModel, prompt: list[int], params: SamplingParams
) -> dict[str, Any]:
    """The fields of the job for log-probabilities."""
    check_count(logprobs, [prompt], params, served, "top_logprobs")
    names = bool(body.return_tokens_as_token_ids)

    def make_reader(index: int, tokenizer: Tokenizer | None) -> ChatLogprobs:
        return ChatLogprobs(prompt, None, cast("Tokenizer", tokenizer), names=names)

    return {"extras": [Extras(logprobs=logprobs)], "make_reader": make_reader}
