"""From the body of ``/generate`` to a job: everything that can be wrong with a request is found here."""

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
    empty_text,
    locate_errors,
    read_salt,
)
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.sampling.params import Sampling
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK
from trunkline.plugins.generation.text.regexes import MAX_LISTS

from .body_schemas import GenerateBody, SessionParams
from .embeds import FIELD, check_copies, read_embeds
from .per_item import read_extras
from .turns import Turns

ONE_INPUT = "Either text, input_ids or input_embeds should be provided."


async def plan(service: Service, body: GenerateBody) -> Job:
    """The job that a body asks for. RequestError for whatever is wrong with the request."""
    served = service.engine.choose(TASK, body.model)
    _check_lora(body)
    inputs, embeds = await _inputs(service, body)
    count, single = len(inputs), inputs.single
    samplings, explicit = _samplings(service, served, body, count, single=single)
    n = samplings[0].n if samplings else 1
    _check_stops(served, samplings)
    service.check_batch(count, n)
    check_copies(embeds, n)
    rids = assign_rids(body.rid, count, single=single, samples=n)
    salts = [
        read_salt(salt, key)
        for salt, key in zip(
            _keys("cache_salt", body.cache_salt, count, single=single),
            _keys("extra_key", body.extra_key, count, single=single),
            strict=True,
        )
    ]
    turns = _turns(service, served, body, count, n, single=single)
    prompts = inputs.ids or await _tokenize(service, served, inputs, may_be_empty=turns is not None)
    if turns is not None:
        bos = getattr(service.engine.tokenizer(served.name), "bos_token_id", None)
        prompts = turns.restore(prompts, bos, inputs.field, single=single)
    for index, (prompt, wanted) in enumerate(zip(prompts, explicit, strict=True)):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_prompt(prompt, served)
            _check_total(len(prompt), wanted, served)
    extras = read_extras(body, served, service.settings(served), inputs, prompts, samplings)
    return Job(
        served=served,
        prompts=prompts,
        samplings=samplings,
        rids=rids,
        priority=body.priority or 0,
        salts=salts,
        embeds=[array.tobytes() for array in embeds],
        turns=turns,
        field=inputs.field,
        single=inputs.single,
        extras=extras,
        show_prompt=bool(body.return_prompt_token_ids),
    )


async def _inputs(service: Service, body: GenerateBody) -> tuple[Inputs, list[np.ndarray]]:
    """The body's texts or lists of token ids, and its vectors, if these are what counts. Ids win over text, and
    both over vectors."""
    if body.text is not None and body.input_ids is not None and body.input_embeds is not None:
        raise RequestError(ONE_INPUT)
    if body.input_ids is not None:
        if not body.input_ids and isinstance(body.session_params, SessionParams) and body.session_params.id:
            return Inputs(ids=[[]], single=True, field="input_ids"), []  # the session has the tokens
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
    if wanted := next(filter(None, adapters), None):
        raise RequestError(
            f"LoRA adapter {wanted[:256]!r} was requested, but LoRA is not enabled. This server has no adapters; leave "
            "lora_path out or set it to null.",
            param="lora_path",
        )


def _keys(name: str, given: str | list[str | None] | None, count: int, *, single: bool) -> list[str | None]:
    """One cache key for each prompt. The errors are SGLang's."""
    if not isinstance(given, list):
        return [given] * count
    if single:
        raise RequestError(f"{name} should be a string for a single request.", param=name)
    if len(given) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    if None in given:
        raise RequestError(f"Every {name} should be a string.", param=name)
    return given


def _turns(
    service: Service, served: ServedModel, body: GenerateBody, count: int, n: int, *, single: bool
) -> Turns | None:
    """What the prompts continue, None when they aren't of a session."""
    given, name = body.session_params, "session_params"
    if given is None:
        return None
    if body.session_id is not None:
        raise RequestError("session_id and session_params cannot both be set.", param=name)
    if isinstance(given, list) and single:
        raise RequestError(f"{name} should be an object for a single request.", param=name)
    if isinstance(given, list) and len(given) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    every = [one or SessionParams() for one in given] if isinstance(given, list) else [given] * count
    named = [one for one in every if one.id is not None]
    if any(one.id is None and one != SessionParams() for one in every) or 0 < len(named) < count:
        raise RequestError(f"{name} needs the id of a session, for each prompt.", param=name)
    if not named:
        return None
    if n > 1:
        raise RequestError("A prompt of a session can't be sampled n > 1 times; send it n times.", param=name)
    if body.text is None and body.input_ids is None:
        raise RequestError(f"{FIELD} can't continue a session, whose prompts are token ids.", param=name)
    return Turns(service.sessions, every, served)


async def _tokenize(service: Service, served: ServedModel, inputs: Inputs, *, may_be_empty: bool) -> list[list[int]]:
    check_tokenizer(service.engine.tokenizer(served.name), served)
    texts = [str(text) for text in inputs.texts]
    for index, text in enumerate(texts):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_characters(len(text), served.info.context_length)
    prompts = await service.engine.tokenize(served.name, texts)
    for index, prompt in enumerate(prompts):
        with locate_errors(inputs.field, index, single=inputs.single):
            if not (prompt or may_be_empty):
                raise empty_text()
    return prompts


def _samplings(
    service: Service, served: ServedModel, body: GenerateBody, count: int, *, single: bool
) -> tuple[list[Sampling], list[int | None]]:
    """Sampling of each prompt, and the ``max_new_tokens`` that the request itself gave."""
    given = body.sampling_params or {}
    if isinstance(given, dict):
        sampling = service.sampling(served, given)
        return [sampling] * count, [_explicit(given, sampling)] * count
    if single:
        raise RequestError("sampling_params must be an object for a single prompt.", param="sampling_params")
    if len(given) != count:
        raise RequestError(
            f"sampling_params has {len(given)} entries for a batch of {count}; give one object, or one a prompt.",
            param="sampling_params",
        )
    samplings = []
    regexes: set[tuple[str, ...]] = set()
    for index, params in enumerate(given):
        with locate_errors("sampling_params", index):
            samplings.append(service.sampling(served, params))
        regexes.add(samplings[-1].stop_regex)
        if len(regexes) > MAX_LISTS:
            raise RequestError(
                f"sampling_params has more than {MAX_LISTS} different values of stop_regex; split the batch.",
                param="stop_regex",
            )
    if len({sampling.n for sampling in samplings}) > 1:
        raise RequestError("The parallel_sample_num should be the same for all samples in sample params.", param="n")
    return samplings, [_explicit(params, one) for params, one in zip(given, samplings, strict=True)]


def _check_stops(served: ServedModel, samplings: list[Sampling]) -> None:
    """RequestError, in SGLang's words, for what is searched in text where ``--skip-tokenizer-init`` means none."""
    if not served.skip_tokenizer_init:
        return
    for sampling in samplings:
        params = sampling.for_engine(1, 0)
        for name, stops in (("stop", params.stop), ("stop_regex", params.stop_regex)):
            if stops:
                raise RequestError(
                    f"{name}={list(stops)!r} is unavailable when skip_tokenizer_init=True "
                    "(requires tokenizer to decode tokens to text for matching).",
                    param=name,
                )


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
