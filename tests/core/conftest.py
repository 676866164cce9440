"""Plugins made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from trunkline.core.discovery import Found
from trunkline.core.hookspecs import hookimpl


@pytest.fixture
def plugin() -> Callable[..., Found]:
    """``plugin("shout", trunkline_settings=function)``: a plugin with these hooks, not installed."""

    def make(name: str, *, mark: bool = True, **functions: Callable[..., Any]) -> Found:
        module = ModuleType(f"plugin_{name}")
        for hook, function in functions.items():
            setattr(module, hook, hookimpl(function) if mark else function)
        return Found(name, module.__name__, module=module)

    return make
