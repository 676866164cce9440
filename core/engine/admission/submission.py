"""Makes the request of a message of the front."""

from __future__ import annotations

import numpy as np

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Submit
from trunkline.core.types import Request

from .embeds import content_salt, read_embeds


def make_request(lane: Lane, message: Submit) -> Request:
    """The request for the lane. RequestError and msgspec's errors for invalid embeddings and params; PluginError.

    ``params`` is None without a stage for the task; the lane refuses the request then.
    """
    stage = lane.stages.get(message.task)
    params = stage.decode_params(message.params) if stage else None
    prompt: list[int] = np.frombuffer(message.prompt, np.int32).tolist()
    embeds = read_embeds(message.embeds, len(prompt)) if message.embeds else None
    return Request(
        key=message.key,
        rid=message.rid,
        task=message.task,
        params=params,
        tokens=prompt,
        prompt_len=len(prompt),
        priority=message.priority,
        namespace=lane.namespace(message.salt + content_salt(message.embeds)),
        cacheable=message.cacheable,
        second_at=message.second_at,
        alone=message.alone,
        embeds=embeds,
    )
