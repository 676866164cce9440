"""What must be set before anything is imported, and what all tests share."""

# ruff: noqa: E402

from __future__ import annotations

import os

# Two spinning OpenMP pools on two busy cores are many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton kernels run on CPU tensors when this is set before they are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests are offline: a test that would download fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# The settings of whoever runs the tests are none of their business.
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)
os.environ.update(NO_COLOR="1", TERM="dumb", COLUMNS="200")

from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["trunkline.core.testing"]  # the fixture ``zoo``

hypothesis.settings.register_profile("trunkline", deadline=None, print_blob=True)
hypothesis.settings.load_profile("trunkline")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's root folder."""
    return Path(__file__).resolve().parent.parent
