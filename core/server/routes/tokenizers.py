"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from trunkline.core.client.models import ModelQuery, named_or_primary
from trunkline.core.client.slices import run_in_slices
from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import AnyRequest, encode_json, json_response, read_body
from trunkline.core.server.api.chat_messages import ChatMessages, TemplateVariables, read_messages
from trunkline.core.server.api.chat_prompts import chat_prompt, template_options
from trunkline.core.server.api.fields import Unsupported
from trunkline.core.server.api.inputs import check_vocabulary, locate_errors
from trunkline.core.server.api.media_types import JSON
from trunkline.core.types import EngineClient, ServedModel, TokenId, Tokenizer


class TokenizeBody(Struct):
    """``/tokenize``: one text, several texts, or the messages of a chat."""

    prompt: str | list[str] | None = None
    messages: ChatMessages | None = None
    model: str | None = None
    add_special_tokens: bool | None = None  # default: true for prompts; messages have those of the template
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: str | None = None
    tools: Unsupported = None
    tool_choice: Unsupported = None


class DetokenizeBody(Struct):
    """``/detokenize``: one list of token ids, or several."""

    tokens: list[TokenId | list[TokenId]]
    model: str | None = None
    skip_special_tokens: bool | None = True


class Tokens(TypedDict):
    """The token ids of a prompt or chat, and how many."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokenLists(TypedDict):
    """The same for a list of prompts."""

    tokens: list[list[int]]
    count: list[int]
    max_model_len: int


class Text(TypedDict):
    """The text, by SGLang's name for it and by vLLM's."""

    text: str
    prompt: str


class Texts(TypedDict):
    """The same for several lists of token ids."""

    text: list[str]
    prompt: list[str]


class TokenizerInfo(TypedDict):
    """What a client needs to make the same prompts as the server."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    chat_template: str | dict[str, str] | None


def tokenizer_routes(engine: EngineClient) -> Iterator[HTTPRouteHandler]:
    """Handlers for the tokenizers of all models, whichever tasks these serve."""
    infer = {"scope": "infer", "dialect": "openai"}
    tokenizing = infer | {"body": TokenizeBody, "replies": (Tokens, TokenLists)}
    detokenizing = infer | {"body": DetokenizeBody, "replies": (Text, Texts)}

    @post(["/tokenize", "/v1/tokenize"], opt=tokenizing, status_code=200)
    async def tokenize(request: AnyRequest) -> Response[bytes]:
        """The token ids of texts, or of the prompt that a chat's messages make."""
        body = await read_body(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Exactly one of 'prompt' or 'messages' must be provided.")
        served, tokenizer = _select_model(engine, body.model)
        texts, special = await _input_texts(engine, served, tokenizer, body)
        limit = served.info.context_length
        ids = await engine.tokenize(served.name, texts, special=special, limit=limit)
        counts = [len(sequence) for sequence in ids]
        reply: Tokens | TokenLists = {"tokens": ids, "count": counts, "max_model_len": limit}
        if not isinstance(body.prompt, list):
            reply = {"tokens": ids[0], "count": counts[0], "max_model_len": limit}
        return await _response(engine, reply, sum(counts))

    @post(["/detokenize", "/v1/detokenize"], opt=detokenizing, status_code=200)
    async def detokenize(request: AnyRequest) -> Response[bytes]:
        """The text of token ids."""
        body = await read_body(request, DetokenizeBody)
        served, tokenizer = _select_model(engine, body.model)
        lists, single = _id_lists(body.tokens, served)
        skip = body.skip_special_tokens is not False

        def decode(start: int, end: int) -> list[str]:
            return [tokenizer.decode(ids, skip_special_tokens=skip) if ids else "" for ids in lists[start:end]]

        texts = await run_in_slices(engine, map(len, lists), decode)
        reply: Text | Texts = {"text": texts, "prompt": texts}
        if single:
            reply = {"text": texts[0], "prompt": texts[0]}
        return await _response(engine, reply, sum(map(len, lists)))

    @get("/tokenizer_info", opt={"scope": "infer", "query": ModelQuery, "replies": TokenizerInfo})
    async def tokenizer_info(request: AnyRequest) -> Response[bytes]:
        """Special tokens and chat template of a model's tokenizer."""
        served, tokenizer = _select_model(engine, request.query_params.get("model"))
        return json_response(describe(served, tokenizer))

    yield from (tokenize, detokenize, tokenizer_info)


def _select_model(engine: EngineClient, name: str | None) -> tuple[ServedModel, Tokenizer]:
    """The model named ``name``, or the primary one if None, and its tokenizer. RequestError if it has none."""
    served = named_or_primary(engine.models, name)
    tokenizer = engine.tokenizer(served.name)
    if tokenizer is None:
        reason = "--skip-tokenizer-init is set" if served.skip_tokenizer_init else "its folder has none"
        raise RequestError(f"{served.name} has no tokenizer: {reason}.")
    return served, tokenizer


async def _input_texts(
    engine: EngineClient, served: ServedModel, tokenizer: Tokenizer, body: TokenizeBody
) -> tuple[list[str], bool]:
    """The texts to tokenise, and whether the tokenizer adds special tokens."""
    if body.prompt is not None:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return texts, body.add_special_tokens is not False
    messages = read_messages(body.messages or [])
    options = template_options(
        tokenizer,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        effort=body.reasoning_effort,
    )
    text = await chat_prompt(engine, served, tokenizer, messages, options)
    # As in SGLang: unless add_generation_prompt is given, the template alone decides on special tokens.
    return [text], bool(body.add_special_tokens) and body.add_generation_prompt is not None


def _id_lists(tokens: Sequence[Any], served: ServedModel) -> tuple[list[list[int]], bool]:
    """The lists of token ids, and whether the body had a single list. RequestError for ids outside the vocabulary."""
    if not any(isinstance(entry, list) for entry in tokens):
        lists, single = [list(tokens)], True
    elif all(isinstance(entry, list) for entry in tokens):
        lists, single = list(tokens), False
    else:
        raise RequestError("tokens mixes ids and lists of ids.", param="tokens")
    for index, ids in enumerate(lists):
        if ids:
            with locate_errors("tokens", index, single=single):
                check_vocabulary(ids, served, "tokens")
    return lists, single


async def _response(engine: EngineClient, reply: Any, size: int) -> Response[bytes]:
    """A JSON response of about ``size`` numbers or characters; long ones are encoded off the event loop."""
    return Response(await engine.off_loop(encode_json, reply, size=size), media_type=JSON)


def describe(served: ServedModel, tokenizer: Tokenizer) -> TokenizerInfo:
    """A tokenizer's class, special tokens as text, and chat template."""

    def token(name: str) -> str | None:
        value = getattr(tokenizer, name, None)
        return None if value is None else str(value)

    bos, eos, pad, unk = map(token, ("bos_token", "eos_token", "pad_token", "unk_token"))
    others = [str(each) for each in getattr(tokenizer, "all_special_tokens", ()) if each not in (bos, eos, pad, unk)]
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": served.info.context_length,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "additional_special_tokens": others,
        "chat_template": tokenizer.chat_template,
    }
