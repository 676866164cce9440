"""Expert statistics from Python, on :class:`trunkline.core.Engine`: no server needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .reply_schemas import Report
from .report import report
from .service import Service
from .settings import DUMP, LOOK, START, STOP

if TYPE_CHECKING:
    from trunkline.core import Engine


def start(engine: Engine, model: str = "") -> Report:
    """Record from now on, from nothing. All functions raise RequestError for a model without expert choices."""
    return _run(engine, START, model)


def stop(engine: Engine, model: str = "") -> Report:
    """Record no more; the report of what was recorded."""
    return _run(engine, STOP, model)


def dump(engine: Engine, model: str = "") -> Report:
    """Write what was recorded to the file that the report's ``file`` names, and forget it."""
    return _run(engine, DUMP, model)


def look(engine: Engine, model: str = "") -> Report:
    """The report of what was recorded so far."""
    return _run(engine, LOOK, model)


def _run(engine: Engine, control: str, model: str) -> Report:
    snapshot = engine.run(Service(engine.client).run(control, model and engine.served(model).name))
    made = report(snapshot)
    if snapshot.file:
        made["file"] = snapshot.file
    return made
