"""Forbids unpickling in server processes (security rule R-1)."""

from __future__ import annotations

import sys
from typing import Any


def forbid_pickle() -> None:
    """Make unpickling of any global raise in this process. Can't be undone, so only servers call it.

    The audit event ``pickle.find_class`` is raised by the C and the Python unpickler for every global that a pickle
    names, before it is looked up.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        raise RuntimeError(f"refused to unpickle {arguments[0]}.{arguments[1]}: trunkline never unpickles")
