"""Generation from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from typing import TYPE_CHECKING, Any, cast

from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.native.plan import plan

from .sequence import Sequence
from .service import Service

if TYPE_CHECKING:
    from trunkline.core import Engine


def generate(
    engine: Engine,
    prompts: Listing[str] | Listing[Listing[int]],
    *,
    model: str = "",
    timeout: float | None = None,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Continue texts or lists of token ids, all in one batch; one record each, as POST /generate gives.

    ``sampling`` are the keys of its ``sampling_params``; the engine's settings apply as they do in a server. With
    ``n`` > 1 a prompt's samples follow one another. Raises RequestError for what the server would answer 4xx,
    TimeoutError when all of it takes more than ``timeout`` seconds.
    """
    if not prompts:
        return []
    body = GenerateBody(sampling_params=sampling, model=model and engine.served(model).name)
    if isinstance(prompts[0], str):
        body.text = list(cast("Listing[str]", prompts))
    else:
        body.input_ids = [list(ids) for ids in cast("Listing[Listing[int]]", prompts)]

    async def run(service: Service) -> list[Sequence]:
        return await service.complete(await plan(service, body))

    return [sequence.record() for sequence in engine.run(run(engine.service(Service)), timeout)]
