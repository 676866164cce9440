"""Forbids unpickling in server processes (security rule R-1)."""

from __future__ import annotations

import sys
from typing import Any


def forbid_pickle() -> None:
    """From now on unpickling any class in this process raises; irrevocable, so servers only.

    ``pickle.find_class`` is audited for every global that a pickle names, by the C and the
    Python unpickler alike, before the global is looked up.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        raise RuntimeError(f"refused to unpickle {arguments[0]}.{arguments[1]}: trunkline never unpickles")
