"""Copies of the kernels' modules with a bug, in place of the modules: what the tests of the kernels must find."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "trunkline.kernels.triton"


@contextmanager
def mutated(name: str, old: str, new: str, folder: Path, users: Iterable[ModuleType]) -> Iterator[None]:
    """Replace ``old`` by ``new`` in the source of a module of the kernels. ValueError unless it is there once.

    The changed copy is written to ``folder``. Its functions take the places of the module's own, in the module, in all
    others of the package and in ``users``.
    """
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{name} has {source.count(old)} times {old!r}")
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    package = [other for known, other in sys.modules.items() if known.startswith(f"{PACKAGE}.")]
    with pytest.MonkeyPatch.context() as patch:
        for attribute, value in list(vars(copy).items()):
            original = vars(module).get(attribute)
            if not callable(value) or value is original:
                continue
            for user in [*package, *users]:
                for alias in [known for known, other in vars(user).items() if other is original]:
                    patch.setattr(user, alias, value)
        yield
