"""Tests of Triton kernels on CPU tensors. The root conftest sets TRITON_INTERPRET; the test extra installs triton."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .checked import Session

# triton has wheels for Linux only; an environment without the test extra has none either
collect_ignore_glob = [] if sys.platform == "linux" and find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _usable_interpreter() -> None:
    """Skip, with the reason, where the interpreter is none that the checks know."""
    from .checked import unsupported

    if reason := unsupported():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def session(request: pytest.FixtureRequest) -> Iterator[Session | None]:
    """Every launch of a test runs in the checked interpreter, with all checks. The value is the installation.

    None in the tests of the interpreter itself: a module that imports ``checked`` installs the checks where it wants.
    """
    from .checked import checked

    if hasattr(request.module, "checked"):
        yield None
        return
    with checked() as installed:
        yield installed
