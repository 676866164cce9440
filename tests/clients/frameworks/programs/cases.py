"""What the programs of clients have in common: their task, and how they report.

The first argument of a program is JSON with the task. Its last line of output is JSON with what each of its functions
returned, or the traceback of the exception that it raised.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TASK = SimpleNamespace(**json.loads(sys.argv[1]))
"""``chat`` and ``vectors``: the base URLs of two servers, which end in /v1. ``question``, ``prompt``, ``tokens``: what
is asked, and how many tokens are wanted. ``texts``: what becomes vectors."""


class Trip(BaseModel):
    """A trip to a city."""  # no text of the model's own choice, so that greedy output ends soon

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


def report(*functions: Callable[[], Any]) -> None:
    """Run the functions one after the other and print what they return."""
    outcomes: dict[str, dict[str, Any]] = {}
    for function in functions:
        try:
            found = function()
            outcomes[function.__name__] = {"value": asyncio.run(found) if inspect.iscoroutine(found) else found}
        except Exception:  # the test of this function shows it
            outcomes[function.__name__] = {"error": traceback.format_exc()}
    print(json.dumps(outcomes))
