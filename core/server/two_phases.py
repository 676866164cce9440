"""Weight updates on several engine replicas: on all of them, or on none."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import EngineClient, on_replica

log = logging.getLogger("trunkline.server")


async def update_all(engine: EngineClient, control: str, model: str, **arguments: Any) -> Any:
    """Run a control that updates a model's weights. Its answer, or the error of the call.

    With several replicas of the model, each one first loads the weights and holds them. If one refuses or is lost, the
    others drop them, and the refusal is the result, or the error is raised. Then all apply them. A replica that is lost
    now has the old weights when it comes back, and gets no requests until it has loaded the new ones.
    """
    names = engine.replicas_of(model)
    if not names:
        return await engine.call(control, model=model, **arguments)
    # A client that disconnects must not end it between the phases.
    return await asyncio.shield(asyncio.create_task(_two_phases(engine, names, control, model, arguments)))


async def _two_phases(
    engine: EngineClient, names: Sequence[str], control: str, model: str, arguments: dict[str, Any]
) -> Any:
    token = uuid.uuid4().hex
    before = max((one.update_number for one in engine.models if model in (one.name, *one.aliases)), default=0)
    held = {"hold": token, "update_number": before + 1}
    loaded = await _call_each(engine, names, control, model, arguments | held)
    failed = [name for name, answer in loaded.items() if isinstance(answer, Exception) or not answer["success"]]
    if failed:
        log.warning("the weights of %s are unchanged: replica %s can't load the new ones", model, ", ".join(failed))
        await _call_each(engine, names, "cancel_update", model, {"hold": token})  # those that hold nothing refuse
        return _result(loaded[failed[0]])
    committed = await _call_each(engine, names, "commit_update", model, {"hold": token})
    for name, answer in committed.items():
        if isinstance(answer, Exception):
            log.error("replica %s of %s was lost when it should apply new weights: %s", name, model, answer)
    done = [answer for answer in committed.values() if not isinstance(answer, Exception)]
    return done[0] if done else _result(committed[names[0]])


async def _call_each(
    engine: EngineClient, names: Sequence[str], control: str, model: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Replica -> its answer to a call, or the error that the call raised."""

    async def call(name: str) -> Any:
        with on_replica(name):
            return await engine.call(control, model=model, **arguments)

    return dict(zip(names, await asyncio.gather(*map(call, names), return_exceptions=True), strict=True))


def _result(answer: Any) -> Any:
    if isinstance(answer, RequestError):
        raise answer
    if isinstance(answer, BaseException):
        raise EngineDown("A replica was lost during the update; try again.") from answer
    return answer
