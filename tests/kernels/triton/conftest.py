"""Tests of Triton kernels on CPU tensors. The root conftest sets TRITON_INTERPRET; the test extra installs triton."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

# triton has wheels for Linux only; an environment without the test extra has none either
collect_ignore_glob = [] if sys.platform == "linux" and find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _usable_interpreter() -> None:
    """Skip, with the reason, where the interpreter is none that the checks know."""
    from .checked import unsupported

    if reason := unsupported():
        pytest.skip(reason)
