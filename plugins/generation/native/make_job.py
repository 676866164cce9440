"""Makes a job from the body of ``/generate``; checks the whole request before anything is submitted."""

from __future__ import annotations

from typing import Any

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    Inputs,
    as_id_lists,
    assign_rids,
    check_characters,
    check_tokenizer,
    empty_text_error,
    locate_errors,
    read_salt,
)
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK
from trunkline.plugins.generation.text.regexes import MAX_LISTS

from .body_schemas import GenerateBody, SessionParams
from .embeds import FIELD, check_copies, read_embeds
from .read_extras import read_extras
from .session_prompts import SessionPrompts

ONE_INPUT = "Either text, input_ids or input_embeds should be provided."


async def make_job(service: Service, body: GenerateBody) -> Job:
    """The job of a body, with its prompts as token ids. RequestError for an invalid request."""
    served = service.engine.choose(TASK, body.model)
    _check_lora(body)
    inputs, embeds = await _inputs(service, body)
    count, single = len(inputs), inputs.single
    sampling, requested_limits = _sampling(service, served, body, count, single=single)
    n = sampling[0].n if sampling else 1
    _check_stops(served, sampling)
    service.check_batch_size(count, n)
    check_copies(embeds, n)
    rids = assign_rids(body.rid, count, single=single, samples=n)
    salts = [
        read_salt(salt, key)
        for salt, key in zip(
            _cache_keys("cache_salt", body.cache_salt, count, single=single),
            _cache_keys("extra_key", body.extra_key, count, single=single),
            strict=True,
        )
    ]
    session_prompts = _session_prompts(service, served, body, count, n, single=single)
    prompts = inputs.ids or await _tokenize(service, served, inputs, allow_empty=session_prompts is not None)
    if session_prompts is not None:
        bos = getattr(service.engine.tokenizer(served.name), "bos_token_id", None)
        prompts = session_prompts.restore(prompts, bos, inputs.field, single=single)
    for index, (prompt, requested) in enumerate(zip(prompts, requested_limits, strict=True)):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_prompt(prompt, served)
            _check_total(len(prompt), requested, served)
    extras = read_extras(body, served, service.settings(served), inputs, prompts, sampling)
    return Job(
        served=served,
        prompts=prompts,
        sampling=sampling,
        rids=rids,
        priority=body.priority or 0,
        salts=salts,
        embeds=[array.tobytes() for array in embeds],
        session_prompts=session_prompts,
        field=inputs.field,
        single=inputs.single,
        extras=extras,
        return_prompt=bool(body.return_prompt_token_ids),
    )


async def _inputs(service: Service, body: GenerateBody) -> tuple[Inputs, list[np.ndarray]]:
    """The body's token ids, else its texts, else its embeddings: float32 ``[T, width]`` of each prompt.

    With embeddings, the token ids are zeros. RequestError if the body has none of these, or all.
    """
    if body.text is not None and body.input_ids is not None and body.input_embeds is not None:
        raise RequestError(ONE_INPUT)
    if body.input_ids is not None:
        if not body.input_ids and isinstance(body.session_params, SessionParams) and body.session_params.id:
            return Inputs(ids=[[]], single=True, field="input_ids"), []  # continues the session without new tokens
        ids, single = as_id_lists(body.input_ids)
        return Inputs(ids=ids, single=single, field="input_ids"), []
    if isinstance(body.text, str):
        return Inputs(texts=[body.text], single=True, field="text"), []
    if body.text is not None:
        return Inputs(texts=list(body.text), field="text"), []
    if body.input_embeds is None:
        raise RequestError(ONE_INPUT)
    arrays, single = await read_embeds(service.engine, body.input_embeds)
    return Inputs(ids=[[0] * len(array) for array in arrays], single=single, field=FIELD), arrays


def _check_lora(body: GenerateBody) -> None:
    adapters = body.lora_path if isinstance(body.lora_path, list) else [body.lora_path]
    if adapter := next(filter(None, adapters), None):
        raise RequestError(
            f"LoRA adapter {adapter[:256]!r} was requested, but LoRA is not enabled. This server has no adapters; "
            "leave lora_path out or set it to null.",
            param="lora_path",
        )


def _cache_keys(name: str, value: str | list[str | None] | None, count: int, *, single: bool) -> list[str | None]:
    """A cache key for each prompt. The errors are SGLang's."""
    if not isinstance(value, list):
        return [value] * count
    if single:
        raise RequestError(f"{name} should be a string for a single request.", param=name)
    if len(value) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    if None in value:
        raise RequestError(f"Every {name} should be a string.", param=name)
    return value


def _session_prompts(
    service: Service, served: ServedModel, body: GenerateBody, count: int, n: int, *, single: bool
) -> SessionPrompts | None:
    """The prompts as continuations of sessions; None if they belong to none."""
    value, name = body.session_params, "session_params"
    if value is None:
        return None
    if body.session_id is not None:
        raise RequestError("session_id and session_params cannot both be set.", param=name)
    if isinstance(value, list) and single:
        raise RequestError(f"{name} should be an object for a single request.", param=name)
    if isinstance(value, list) and len(value) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    params = [each or SessionParams() for each in value] if isinstance(value, list) else [value] * count
    with_id = [each for each in params if each.id is not None]
    if any(each.id is None and each != SessionParams() for each in params) or 0 < len(with_id) < count:
        raise RequestError(f"{name} needs the id of a session, for each prompt.", param=name)
    if not with_id:
        return None
    if n > 1:
        raise RequestError("A prompt of a session can't be sampled n > 1 times; send it n times.", param=name)
    if body.text is None and body.input_ids is None:
        raise RequestError(f"{FIELD} can't continue a session, whose prompts are token ids.", param=name)
    return SessionPrompts(service.sessions, params, served)


async def _tokenize(service: Service, served: ServedModel, inputs: Inputs, *, allow_empty: bool) -> list[list[int]]:
    check_tokenizer(service.engine.tokenizer(served.name), served)
    texts = [str(text) for text in inputs.texts]
    for index, text in enumerate(texts):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_characters(len(text), served.info.context_length)
    prompts = await service.engine.tokenize(served.name, texts)
    for index, prompt in enumerate(prompts):
        with locate_errors(inputs.field, index, single=inputs.single):
            if not (prompt or allow_empty):
                raise empty_text_error()
    return prompts


def _sampling(
    service: Service, served: ServedModel, body: GenerateBody, count: int, *, single: bool
) -> tuple[list[SamplingParams], list[int | None]]:
    """The sampling parameters of each prompt, and its ``max_new_tokens`` if the request itself sets it."""
    value = body.sampling_params or {}
    if isinstance(value, dict):
        params = service.sampling_params(served, value)
        return [params] * count, [_requested_limit(value, params)] * count
    if single:
        raise RequestError("sampling_params must be an object for a single prompt.", param="sampling_params")
    if len(value) != count:
        raise RequestError(
            f"sampling_params has {len(value)} entries for a batch of {count}; give one object, or one per prompt.",
            param="sampling_params",
        )
    sampling = []
    regexes: set[tuple[str, ...]] = set()
    for index, requested in enumerate(value):
        with locate_errors("sampling_params", index):
            sampling.append(service.sampling_params(served, requested))
        regexes.add(sampling[-1].stop_regex)
        if len(regexes) > MAX_LISTS:
            raise RequestError(
                f"sampling_params has more than {MAX_LISTS} different values of stop_regex; split the batch.",
                param="stop_regex",
            )
    if len({params.n for params in sampling}) > 1:
        raise RequestError("The parallel_sample_num should be the same for all samples in sample params.", param="n")
    return sampling, [_requested_limit(requested, params) for requested, params in zip(value, sampling, strict=True)]


def _check_stops(served: ServedModel, sampling: list[SamplingParams]) -> None:
    """RequestError for stop strings and expressions with ``--skip-tokenizer-init``. The message is SGLang's."""
    if not served.skip_tokenizer_init:
        return
    for params in sampling:
        for name, stops in (("stop", params.stop), ("stop_regex", params.stop_regex)):
            if stops:
                raise RequestError(
                    f"{name}={list(stops)!r} is unavailable when skip_tokenizer_init=True "
                    "(requires tokenizer to decode tokens to text for matching).",
                    param=name,
                )


def _requested_limit(requested: dict[str, Any], params: SamplingParams) -> int | None:
    return params.max_new_tokens if requested.get("max_new_tokens") is not None else None


def _check_total(length: int, requested: int | None, served: ServedModel) -> None:
    """RequestError if a prompt and the ``max_new_tokens`` that its request sets exceed the context length."""
    context = served.info.context_length
    if requested is not None and length + requested > context:
        raise RequestError(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. "
            f"You requested a total of {length + requested} tokens: {length} tokens from the input messages and "
            f"{requested} tokens for the completion. Please reduce the number of tokens in the input messages or "
            "the completion to fit within the limit.",
            param="max_new_tokens",
        )
