"""Runs all items of a request and waits for the results; for routes without streams."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient, Reply, ServedModel, Submission

from .inputs import locate_error, locate_errors
from .prepare import PreparedInput
from .reply_schemas import FinishReason, ItemMeta, Usage


async def submit_and_wait(
    engine: EngineClient,
    served: ServedModel,
    task: str,
    items: Sequence[PreparedInput],
    params: Struct,
    rids: Sequence[str],
    *,
    priority: int = 0,
    salt: bytes = b"",
    single: bool = False,
    field: str = "input",
) -> list[Reply]:
    """Submit all items at once and wait until all have ended. Returns the replies in the same order.

    When one fails, its error is raised (with ``text[3]: …`` for ``field`` "text", unless ``single``) and the others
    are cancelled; all are when the caller is cancelled.
    """
    submissions = [
        Submission(prompt=item.ids, params=params, rid=rid, priority=priority, salt=salt, second_at=item.second_at)
        for item, rid in zip(items, rids, strict=True)
    ]
    replies = engine.submit(served.name, task, submissions)
    try:
        await wait_for_all(replies)
    except RequestError as error:
        failed = next((index for index, reply in enumerate(replies) if reply.error is error), None)
        if failed is None or error.status == 503:  # 503 is about the server, not about the item
            raise
        raise locate_error(error, field, None if single else failed) from None
    for index, reply in enumerate(replies):
        with locate_errors(field, index, single=single):
            check_finish(reply)
    return replies


async def wait_for_all(replies: Sequence[Reply]) -> None:
    """Wait until all replies have ended. When one fails, or the caller is cancelled, all are cancelled."""
    try:
        if len(replies) == 1:
            await replies[0].result()
        else:
            await asyncio.gather(*(reply.result() for reply in replies))
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise


def check_finish(reply: Reply) -> None:
    """RequestError when a reply ended without a result (aborted by ``/abort_request``, for example)."""
    finish = reply.finish or {}
    if finish.get("type") == "abort":
        raise RequestError(str(finish.get("message", "Aborted")), status=finish.get("status_code") or 499)


def item_meta(reply: Reply, served: ServedModel, item: PreparedInput, *, cached: bool = False) -> ItemMeta:
    """SGLang's ``meta_info`` for an item without output tokens; with ``cached``, including ``cached_tokens``.

    A truncated item also has ``truncated`` and, if its tokens were counted, ``original_tokens``.
    """
    meta: ItemMeta = {
        "id": reply.rid,
        "finish_reason": cast("FinishReason", reply.finish),
        "prompt_tokens": len(item.ids),
        "weight_version": reply.weight_version or served.weight_version,
        "e2e_latency": reply.finished - reply.created,
    }
    if cached:
        meta["cached_tokens"] = reply.cached_tokens
    return {**meta, **item.report}


def token_usage(prompt: int, completion: int = 0, cached: int | None = None) -> Usage:
    """OpenAI's token counts; ``cached`` None leaves out the details of the prompt."""
    usage: Usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    return usage if cached is None else {**usage, "prompt_tokens_details": {"cached_tokens": cached}}
