"""From the body of a chat to a job, and to the reader of its replies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from msgspec import structs

from trunkline.core.errors import RequestError
from trunkline.core.server.api import chat_prompt, read_messages, read_salt, template_options
from trunkline.core.types import ServedModel, Tokenizer
from trunkline.plugins.generation.extras import Extras
from trunkline.plugins.generation.formats.model_format import IN_THREAD, ReplyReader
from trunkline.plugins.generation.sampling.checks import MAX_GRAMMAR_BYTES
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.schemas import Grammar, LogprobParams
from trunkline.plugins.generation.service import Job, Service, check_prompt
from trunkline.plugins.generation.settings import TASK

from .chat_schemas import ChatBody
from .replies import request_ids
from .sampling import check_total, sampling_params
from .token_logprobs import ChatLogprobs, check_count, read_logprobs
from .tools import ToolRequest, read_tools


async def make_job(
    service: Service, body: ChatBody, rid: str, defaults: Callable[[str, str], dict[str, Any]]
) -> tuple[Job, ReplyReader | None]:
    """The job of a body, with its prompt as token ids; and how its replies are split, None if they have content only.

    ``defaults``: :func:`chat_defaults`, with a cache. RequestError for an invalid request.
    """
    served = service.engine.choose(TASK, body.model)
    messages = read_messages(body.messages)
    tools = read_tools(body.tools or [], body.tool_choice, parallel=body.parallel_tool_calls)
    model_defaults = defaults(served.info.path, service.settings(served).sampling_defaults)
    params, limit_field = sampling_params(service, served, body, {**model_defaults, "max_new_tokens": None})
    logprobs = _logprobs(body)
    service.check_batch_size(1, params.n)
    tokenizer = service.engine.tokenizer(served.name)
    if tokenizer is None:
        raise RequestError(f"{served.name} has no tokenizer; use /generate with input_ids.")
    messages, shown = service.formats.get(served).chat(messages, tools.shown)
    options = template_options(
        tokenizer,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        effort=body.reasoning_effort,
        tools=shown,
    )
    text = await chat_prompt(service.engine, served, tokenizer, messages, options)
    reader, params = await _reader(service, served, body, tools, params, text)
    [prompt] = await service.engine.tokenize(served.name, [text], special=False, limit=served.info.context_length)
    check_prompt(prompt, served)
    check_total(len(prompt), params, served, limit_field, "messages have")
    job = Job(
        served=served,
        prompts=[prompt],
        sampling=[params],
        rids=request_ids(rid, params.n),
        priority=body.priority or 0,
        salts=[read_salt(body.cache_salt, body.extra_key)],
        kept=frozenset() if reader is None else reader.kept,
        **({} if logprobs is None else _logprob_outputs(logprobs, body, served, prompt, params)),
    )
    return job, reader


async def _reader(
    service: Service, served: ServedModel, body: ChatBody, tools: ToolRequest, params: SamplingParams, prompt: str
) -> tuple[ReplyReader | None, SamplingParams]:
    """How replies are split, and the parameters with the grammar for what must be called or answered."""
    model = service.formats.get(served)
    if tools.schemas:
        model.check_tools()
    regions = model.regions(bool(tools.schemas), body.separate_reasoning is not False)
    if regions is None:
        return None, params

    def make_reader() -> ReplyReader:
        return ReplyReader(model, regions, prompt, tools.schemas, tools.fields, many=tools.many)

    reader: ReplyReader = await service.engine.off_loop(make_reader, size=IN_THREAD if model.form.own else len(prompt))
    grammar = params.grammar
    if grammar is None and not tools.forced:
        return reader, params
    # A schema for the answer doesn't matter if there is none, only calls.
    if tools.forced and grammar is not None and (grammar.kind != "json_schema" or body.response_format is None):
        raise RequestError(f"tool_choice forces a call, so that {grammar.kind} can't be set.", param="tool_choice")
    if grammar is not None and grammar.kind != "json_schema":
        if tools.schemas:
            raise RequestError(
                f"{grammar.kind} can't be combined with tools, because the model could call none; a JSON Schema can.",
                param="tools",
            )
        return None, params
    answer = None if grammar is None or tools.forced else grammar.text
    if answer is not None and not tools.schemas and not reader.in_reasoning():
        return None, params  # the whole output is the answer
    text = await service.engine.off_loop(reader.grammar, answer, size=IN_THREAD)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"The grammar of the tools may have at most {MAX_GRAMMAR_BYTES} bytes; send fewer or smaller tools.",
            param="tools",
        )
    return reader, structs.replace(params, grammar=Grammar("lark", text))


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
        return ChatLogprobs(prompt, None, cast("Tokenizer", tokenizer), names=names, output=params.max_new_tokens != 0)

    return {"extras": [Extras(logprobs=logprobs)], "make_reader": make_reader}
