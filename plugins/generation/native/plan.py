"""From the body of ``/generate`` to a job: everything that can be wrong with a request is found here."""

from __future__ import annotations

from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    Inputs,
    as_id_lists,
    assign_rids,
    check_characters,
    check_tokenizer,
    locate_errors,
    read_salt,
)
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.sampling.params import Sampling
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .body_schemas import GenerateBody
from .per_item import read_extras


async def plan(service: Service, body: GenerateBody) -> Job:
    """The job that a body asks for. RequestError for whatever is wrong with the request."""
    served = service.engine.choose(TASK, body.model)
    inputs = _inputs(body)
    samplings, explicit = _samplings(service, served, body, len(inputs), single=inputs.single)
    n = samplings[0].n if samplings else 1
    service.check_batch(len(inputs), n)
    rids = assign_rids(body.rid, len(inputs), single=inputs.single, samples=n)
    prompts = inputs.ids or await _tokenize(service, served, inputs)
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
        salt=read_salt(body.cache_salt, body.extra_key),
        field=inputs.field,
        single=inputs.single,
        extras=extras,
    )


def _inputs(body: GenerateBody) -> Inputs:
    """The body's texts or lists of token ids. Ids win over text."""
    if body.input_ids is not None:
        ids, single = as_id_lists(body.input_ids)
        return Inputs(ids=ids, single=single, field="input_ids")
    if body.text is None:
        raise RequestError("Either text, input_ids or input_embeds should be provided.")
    if isinstance(body.text, str):
        return Inputs(texts=[body.text], single=True, field="text")
    return Inputs(texts=list(body.text), field="text")


async def _tokenize(service: Service, served: ServedModel, inputs: Inputs) -> list[list[int]]:
    check_tokenizer(service.engine.tokenizer(served.name), served)
    texts = [str(text) for text in inputs.texts]
    for index, text in enumerate(texts):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_characters(len(text), served.info.context_length)
    prompts = await service.engine.tokenize(served.name, texts)
    for index, prompt in enumerate(prompts):
        with locate_errors(inputs.field, index, single=inputs.single):
            if not prompt:
                raise RequestError("texts cannot be empty: tokenising gave no token.")
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
    for index, params in enumerate(given):
        with locate_errors("sampling_params", index):
            samplings.append(service.sampling(served, params))
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
