"""``/score`` and ``/v1/score``: vLLM's pairs of texts, and SGLang's items with label tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from litestar import Response, route
from litestar.enums import HttpMethod

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    AnyRequest,
    InvalidBody,
    ItemMeta,
    PreparedInput,
    check_batch_size,
    check_characters,
    check_vocabulary,
    item_meta,
    json_response,
    locate_errors,
    read_body,
    read_salt,
    run_in_slices,
    token_usage,
    while_connected,
)
from trunkline.core.types import Reply

from .body_schemas import ScoreBody
from .detect import sigmoid
from .prompts import Prompt, split_prompts
from .reply_schemas import PairScores, Scoring
from .reranker import QUERY, Field, Limits, Reranker, read_values, uncounted
from .schemas import RerankParams, check_labels
from .service import ScoredPair, ScoringRequest, Service, check_texts, lengths, new_id, usage


def score_routes(service: Service) -> list[Any]:
    """The handlers, which use ``service``."""

    @route(
        ["/score", "/v1/score"],
        http_method=[HttpMethod.POST, HttpMethod.PUT],
        opt={"scope": "infer", "dialect": "openai", "body": ScoreBody, "replies": (PairScores, Scoring)},
        status_code=200,
        summary="Score pairs of texts, or the tokens that may follow an item",
        description="vLLM's fields `text_1`, `text_2`, or SGLang's `query`, `items`, `label_token_ids`.",
    )
    async def score(request: AnyRequest) -> Response[Any]:
        body = await read_body(request, ScoreBody)
        pairs, items = body.text_1 is not None or body.text_2 is not None, body.query is not None
        if pairs and (items or body.items is not None):
            raise RequestError("Send text_1 and text_2, or query and items, not both.", param="text_1")
        if pairs:
            return await _pairs(service, request, body)
        if body.query is None or body.items is None:
            raise InvalidBody("Object missing required fields: `text_1` and `text_2`, or `query` and `items`")
        if body.label_token_ids is None:
            return await _items(service, request, body)
        return await _labels(service, request, body)

    return [score]


async def _pairs(service: Service, request: AnyRequest, body: ScoreBody) -> Response[Any]:
    """vLLM's form: one first text with each second text, or the texts in pairs."""
    if body.text_1 is None or body.text_2 is None:
        raise InvalidBody("Object missing required field `text_1` or `text_2`")
    _refuse(body, "label_token_ids", "apply_softmax", "item_first")
    reranker = service.reranker(body.model)
    firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if not firsts or len(firsts) != len(seconds):
        raise RequestError(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; send as many, or one in text_1.", param="text_2"
        )
    name = new_id("score")
    fields = Field("text_1", isinstance(body.text_1, str)), Field("text_2", isinstance(body.text_2, str))
    scored = await _scored(service, request, reranker, body, (firsts, seconds), fields, name)
    return json_response(
        {
            "id": name,
            "object": "list",
            "created": int(time.time()),
            "model": reranker.served.name,
            "data": [
                {"index": index, "object": "score", "score": value, **one.report}
                for index, (one, value) in enumerate(zip(scored, _values(scored, body), strict=True))
            ],
            "usage": usage(scored),
        }
    )


async def _items(service: Service, request: AnyRequest, body: ScoreBody) -> Response[Any]:
    """SGLang's form for a model with a score head: each item is the second text of a pair."""
    reranker = service.reranker(body.model)
    if reranker.by_labels:
        raise RequestError("label_token_ids is required for generation (CausalLM) models.", param="label_token_ids")
    if body.apply_softmax:
        raise RequestError("apply_softmax needs label_token_ids: there is one score per item.", param="apply_softmax")
    texts = [body.items] if isinstance(body.items, str) else body.items
    if not isinstance(body.query, str) or not all(isinstance(text, str) for text in texts or ()):
        raise RequestError(
            "This model scores pairs of texts: query and items must be text, not token ids.", param="items"
        )
    items = [text for text in texts or () if isinstance(text, str)]
    if not items:
        raise RequestError("items cannot be empty", param="items")
    queries, field = [body.query] * len(items), Field("items", isinstance(body.items, str))
    pairs, fields = ((items, queries), (field, QUERY)) if body.item_first else ((queries, items), (QUERY, field))
    scored = await _scored(service, request, reranker, body, pairs, fields, new_id("score"))
    return _scoring(reranker, body, [[value] for value in _values(scored, body)], [one.meta for one in scored])


async def _scored(
    service: Service,
    request: AnyRequest,
    reranker: Reranker,
    body: ScoreBody,
    pairs: tuple[list[str], list[str]],
    fields: tuple[Field, Field],
    name: str,
) -> list[ScoredPair]:
    """Scores of the pairs. ``fields``: the fields of their first and second texts."""
    for texts, field in zip(pairs, fields, strict=True):
        check_texts(texts, field)
    scoring_request = ScoringRequest(
        queries=pairs[0],
        documents=pairs[1],
        limits=Limits.of(reranker.served, body.truncate),
        instruct=body.instruct,
        priority=body.priority or 0,
        salt=read_salt(body.cache_salt, body.extra_key),
        fields=fields,
    )
    return await while_connected(request, service.score(reranker, scoring_request, name))


def _values(scored: Sequence[ScoredPair], body: ScoreBody) -> list[float]:
    """The scores with the checkpoint's activation; with ``use_activation`` true, probabilities, false, logits."""
    if body.use_activation is None:
        return [one.score for one in scored]
    return [sigmoid(one.logit) if body.use_activation else one.logit for one in scored]


def _refuse(body: ScoreBody, *fields: str) -> None:
    for field in fields:
        if getattr(body, field):
            raise RequestError(f"{field} belongs to query and items, not to text_1 and text_2.", param=field)


# -- label tokens ----------------------------------------------------------------------------


async def _labels(service: Service, request: AnyRequest, body: ScoreBody) -> Response[Any]:
    """SGLang's form for causal models: the probability of each label token after query and item."""
    reranker = service.reranker(body.model)
    if not reranker.by_labels:
        raise RequestError(
            f"{reranker.served.name} has a score head, no tokens to score: leave label_token_ids out.",
            param="label_token_ids",
        )
    _refuse_labels(body)
    labels = tuple(body.label_token_ids or ())
    check_labels(labels, reranker.served.info.vocab_size)
    pieces = await _label_items(service, reranker, body)
    salt = read_salt(body.cache_salt, body.extra_key)
    work = service.run(
        reranker,
        pieces,
        RerankParams(labels),
        new_id("score"),
        priority=body.priority or 0,
        salt=salt,
        field=Field("items", isinstance(body.items, str)),
    )
    replies = await while_connected(request, work)
    pairs = [(some[0], one[0]) for some, one in zip(replies, pieces, strict=True)]
    scores = [probabilities(reply, softmax=bool(body.apply_softmax)) for reply, _ in pairs]
    metas = [item_meta(reply, reranker.served, item, cached=True) for reply, item in pairs]
    return _scoring(reranker, body, scores, metas)


def _refuse_labels(body: ScoreBody) -> None:
    for field in ("use_activation", "instruct"):
        if getattr(body, field) is not None:
            raise RequestError(f"{field} doesn't apply to label_token_ids; leave it out.", param=field)


def probabilities(reply: Reply, *, softmax: bool) -> list[float]:
    """p(label) over the whole vocabulary, or with ``softmax`` over the labels only."""
    values = read_values(reply.data).astype(np.float64)
    logits, whole = values[:-1], values[-1]
    if softmax:
        whole = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    found: list[float] = np.exp(logits - whole).tolist()
    return found


async def _label_items(service: Service, reranker: Reranker, body: ScoreBody) -> list[list[PreparedInput]]:
    """The prompts: query and item joined. Only items are truncated."""
    query, items = body.query, _listed(body.items)
    if not items or not query:
        raise RequestError(f"{'items' if query else 'query'} cannot be empty", param="items" if query else "query")
    check_batch_size(len(items), service.max_batch, "items")
    limits, field = Limits.of(reranker.served, body.truncate), Field("items", isinstance(body.items, str))
    if isinstance(query, list):
        if not all(isinstance(item, list) for item in items):
            raise RequestError("query is a list of token ids, so every item must be one.", param="items")
        lists = [item for item in items if isinstance(item, list)]
        prompts = _join_ids(reranker, query, lists, item_first=bool(body.item_first))
        return reranker.fitted(prompts, limits, fields=(QUERY, field))
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) < len(items):
        raise RequestError("query is text, so every item must be text.", param="items")
    check_characters(len(query), limits.prompt)

    def join(start: int, end: int) -> list[list[PreparedInput]]:
        return _join_texts(reranker, query, texts[start:end], limits, bool(body.item_first), start, field)

    return await run_in_slices(service.engine, lengths([query] * len(texts), texts), join)


def _listed(items: Any) -> list[str | list[int]]:
    """A single text or list of ids as a list of one."""
    if isinstance(items, str) or (items and all(isinstance(item, int) for item in items)):
        return [items]
    if any(isinstance(item, int) for item in items):
        raise RequestError("items mixes token ids with texts or lists.", param="items")
    return list(items)


def _join_ids(reranker: Reranker, query: list[int], items: list[list[int]], *, item_first: bool) -> list[Prompt]:
    check_vocabulary(query, reranker.served, "query")
    for index, item in enumerate(items):
        with locate_errors("items", index):
            if not item:
                raise RequestError("items must not be empty.", param="items")
            check_vocabulary(item, reranker.served, "items")
    return [Prompt([] if item_first else query, item, query if item_first else []) for item in items]


def _join_texts(
    reranker: Reranker, query: str, items: list[str], limits: Limits, item_first: bool, first: int, field: Field
) -> list[list[PreparedInput]]:
    kept = []
    for index, item in enumerate(items, first):
        with locate_errors("items", index, single=field.single):
            if not item:
                raise RequestError("items must not be empty.", param="items")
            kept.append(reranker.bounded(item, limits))
    nothing, queries = [""] * len(items), [query] * len(items)
    heads, tails = (nothing, queries) if item_first else (queries, nothing)
    prompts = split_prompts(reranker.tokenizer, heads, kept, tails, special=True)
    return uncounted(reranker.fitted(prompts, limits, first=first, fields=(QUERY, field)), items, kept)


def _scoring(reranker: Reranker, body: ScoreBody, scores: list[list[float]], metas: list[ItemMeta]) -> Response[Any]:
    tokens = sum(meta["prompt_tokens"] for meta in metas)
    return json_response(
        {
            "scores": scores,
            "model": reranker.served.name,
            "usage": token_usage(tokens, cached=sum(meta["cached_tokens"] for meta in metas)),
            "object": "scoring",
            "meta_info": metas,
        }
    )
