"""Other projects' clients, unmodified, each in a virtual environment of its own, and the server that they talk to."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.catalogue import fetch

HERE = Path(__file__).parent
MODEL = "demo:smollm2-135m-instruct"
SECONDS = 300  # for one program of a client


def load(path: Path) -> ModuleType:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(f"clients_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


environments = load(HERE.parent / "environments.py")
SGLANG = environments.Environment(
    "sglang",
    requirements=(
        "aiohttp", "datasets", "ipython", "msgspec", "numpy", "orjson", "pillow", "pybase64", "pydantic", "requests",
        "tqdm", "transformers",
    ),
    bare=("sglang==0.5.23",),  # its dependencies are those of a server with CUDA
)  # fmt: skip
LM_EVAL = environments.Environment("lm-eval", requirements=("lm_eval[api]>=0.4.13,<0.5", "accelerate"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo model."""
    try:
        return fetch(MODEL)
    except ModelError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def server(demo: Path, live_server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A live server of the demo model in float32, so that its numbers compare with those of transformers."""
    log = tmp_path_factory.mktemp("live") / "log"
    live = live_server.LiveServer([MODEL, "--dtype", "float32"], log)
    live.wait()
    yield live
    live.close()


@pytest.fixture(scope="session")
def reference(demo: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and float32 model of the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(demo), AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


Run = Callable[..., str]


def runner(client: Any, offline: Path) -> Run:
    """``run("-m", "module", "--flag")`` runs the client's interpreter and returns its standard output."""
    try:
        python = environments.python_of(client)
    except environments.Unavailable as exc:
        pytest.skip(str(exc))

    def run(*arguments: str, cwd: Path = HERE) -> str:
        own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(offline)}
        done = subprocess.run(
            [str(python), *arguments],
            cwd=cwd,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-20_000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(SGLANG, tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(LM_EVAL, tmp_path_factory.mktemp("lm-eval"))
