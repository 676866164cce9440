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
    """Clear the record and start recording. All functions raise RequestError for a model that can't be recorded."""
    return _run(engine, START, model)


def stop(engine: Engine, model: str = "") -> Report:
    """Stop recording. Returns the report of the record, which is kept."""
    return _run(engine, STOP, model)


def dump(engine: Engine, model: str = "") -> Report:
    """Write the record to a file, whose path is the report's ``file``, and clear it."""
    return _run(engine, DUMP, model)


def look(engine: Engine, model: str = "") -> Report:
    """The report of the record so far."""
    return _run(engine, LOOK, model)


def _run(engine: Engine, control: str, model: str) -> Report:
    return report(engine.run(Service(engine.client).run(control, model and engine.served(model).name)))
