"""``POST /v1/completions``: OpenAI's older route, which continues prompts without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

from litestar import Response, post

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    JSON,
    SSE,
    AnyRequest,
    OpenAIError,
    as_id_lists,
    check_characters,
    locate_errors,
    new_rid,
    read_body,
    read_salt,
)
from trunkline.core.types import ServedModel, Tokenizer
from trunkline.plugins.generation.extras import Extras
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .completion_replies import CompletionReplies
from .completion_schemas import CompletionBody
from .defaults import completion_defaults
from .replies import request_ids
from .reply_schemas import CompletionChunk, CompletionReply
from .sampling import check_total, sampling_params
from .token_logprobs import CompletionLogprobs, check_count, read_logprobs

FIELD = "prompt"


class Prompts(NamedTuple):
    """The prompts of a body as token ids. ``echoed``: the text of each with which the reply begins, "" without echo."""

    ids: list[list[int]]
    echoed: Sequence[str]
    single: bool  # the body has one prompt, not a list


def completion_routes(service: Service) -> list[Any]:
    """The handler of ``/v1/completions``."""
    defaults = lru_cache(maxsize=64)(completion_defaults)  # more models than one server has

    replies = {JSON: CompletionReply, SSE: (CompletionChunk, OpenAIError)}
    opt = {"scope": "infer", "dialect": "openai", "body": CompletionBody, "replies": {200: replies}}

    @post("/v1/completions", opt=opt, status_code=200, summary="OpenAI completions", operation_id="completions")
    async def completions(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, CompletionBody)
        served = service.engine.choose(TASK, body.model)
        model_defaults = defaults(served.info.path, service.settings(served).sampling_defaults)
        params, limit_field = sampling_params(service, served, body, model_defaults)
        _check_best_of(body, params.n)
        prompts = await _read_prompts(service, served, body, params)
        if body.max_tokens is not None:  # the default is lowered to what fits
            for index, prompt in enumerate(prompts.ids):
                with locate_errors(FIELD, index, single=prompts.single):
                    check_total(len(prompt), params, served, limit_field, "prompt has")
        rid = body.rid or f"cmpl-{new_rid()}"
        job = _make_job(body, rid, served, params, prompts)
        response: Response[Any] = await CompletionReplies(service, job, body, rid, prompts.echoed).response(request)
        return response

    return [completions]


def _check_best_of(body: CompletionBody, n: int) -> None:
    if body.best_of not in (None, n):
        raise RequestError(
            f"best_of must be equal to n ({n}), got {body.best_of}: the server returns all samples and doesn't choose "
            "among them. Leave best_of out, and set n.",
            param="best_of",
        )


async def _read_prompts(service: Service, served: ServedModel, body: CompletionBody, params: SamplingParams) -> Prompts:
    """The prompts of a body. RequestError if there are none, or too many, or one is invalid."""
    tokenizer = service.engine.tokenizer(served.name)
    if tokenizer is None:
        raise RequestError(f"{served.name} has no tokenizer; use /generate with input_ids.")
    if not body.prompt:
        raise RequestError("Prompt cannot be empty", param=FIELD)
    listed = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts: list[str] = []
    if any(isinstance(each, str) for each in listed):
        single = isinstance(body.prompt, str)
        service.check_batch_size(len(listed), params.n)
        texts = _check_texts(listed, served, single=single)
        ids = await service.engine.tokenize(served.name, texts, special=body.add_special_tokens is not False)
    else:
        ids, single = as_id_lists(cast("list[int | list[int]]", listed), FIELD)
        service.check_batch_size(len(ids), params.n)
    for index, prompt in enumerate(ids):
        with locate_errors(FIELD, index, single=single):
            check_prompt(prompt, served, FIELD)
    if not body.echo:
        return Prompts(ids, [""] * len(ids), single)
    return Prompts(ids, texts or await _decode(service, tokenizer, ids, params), single)


def _check_texts(given: Sequence[Any], served: ServedModel, *, single: bool) -> list[str]:
    """The same texts. RequestError if one is empty or far too long, or token ids are among them."""
    for index, text in enumerate(given):
        with locate_errors(FIELD, index, single=single):
            if not isinstance(text, str):
                raise RequestError("texts and token ids are mixed; send only texts or only token ids.")
            if not text:
                raise RequestError("Prompt cannot be empty")
            check_characters(len(text), served.info.context_length)
    return list(given)


async def _decode(
    service: Service, tokenizer: Tokenizer, prompts: Sequence[list[int]], params: SamplingParams
) -> list[str]:
    """The texts of prompts that were sent as ids."""

    def decode() -> list[str]:
        return [tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens) for ids in prompts]

    texts: list[str] = await service.engine.off_loop(decode, size=4 * sum(map(len, prompts)))
    return texts


def _make_job(body: CompletionBody, rid: str, served: ServedModel, params: SamplingParams, prompts: Prompts) -> Job:
    count = len(prompts.ids)
    return Job(
        served=served,
        prompts=prompts.ids,
        sampling=[params] * count,
        rids=request_ids(rid, count * params.n),
        priority=body.priority or 0,
        salts=[read_salt(body.cache_salt, body.extra_key)] * count,
        field=FIELD,
        single=prompts.single,
        **_logprob_outputs(body, served, params, prompts),
    )


def _logprob_outputs(
    body: CompletionBody, served: ServedModel, params: SamplingParams, prompts: Prompts
) -> dict[str, Any]:
    """The fields of the job for log-probabilities: of the output and, with ``echo``, of the prompt."""
    if body.logprobs is None:
        return {}
    start = 0 if body.echo else None
    logprobs = read_logprobs(body.logprobs, start, "logprobs")
    check_count(logprobs, prompts.ids, params, served, "logprobs")
    names = bool(body.return_tokens_as_token_ids)

    def make_reader(index: int, tokenizer: Tokenizer | None) -> CompletionLogprobs:
        return CompletionLogprobs(
            prompts.ids[index],
            start,
            cast("Tokenizer", tokenizer),
            names=names,
            output=params.max_new_tokens != 0,
            skip_special_tokens=params.skip_special_tokens,
            prompt_length=len(prompts.echoed[index]),
        )

    return {"extras": [Extras(logprobs=logprobs)] * len(prompts.ids), "make_reader": make_reader}
