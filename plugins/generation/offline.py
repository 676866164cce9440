"""Generation from Python without a server, with :class:`trunkline.core.Engine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.native.make_job import make_job

from .sequence import OutputSequence
from .service import Service

if TYPE_CHECKING:
    from trunkline.core import Engine


def generate(
    engine: Engine,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    model: str = "",
    timeout: float | None = None,
    **sampling_params: Any,
) -> list[dict[str, Any]]:
    """Continue texts or lists of token ids, in one batch; returns the records of ``POST /generate``.

    ``sampling_params`` are those of ``/generate``. With ``n`` > 1, the samples of a prompt follow one another. The
    engine's settings apply as in a server. Raises RequestError for requests that a server would refuse, TimeoutError
    if all of it takes more than ``timeout`` seconds.
    """
    if not prompts:
        return []
    body = GenerateBody(sampling_params=sampling_params, model=model and engine.served(model).name)
    if isinstance(prompts[0], str):
        body.text = list(cast("Sequence[str]", prompts))
    else:
        body.input_ids = [list(ids) for ids in cast("Sequence[Sequence[int]]", prompts)]

    async def run(service: Service) -> list[OutputSequence]:
        return await service.complete(await make_job(service, body))

    return [sequence.record() for sequence in engine.run(run(engine.service(Service)), timeout)]
