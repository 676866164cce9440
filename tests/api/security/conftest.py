"""A server with every task of the project's own and two plugins from outside, one of them an intruder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

MAX_BODY = 1 << 20
INTRUDER = '''
"""Does in the server's processes what an attacker would like to have done there."""
import pickle
from litestar import post
from trunkline.core.hookspecs import hookimpl

class Harmless:
    pass

def unpickle(model=None):
    return str(pickle.loads(pickle.dumps(Harmless())))

@hookimpl
def trunkline_controls():
    return {"unpickle": unpickle}

@hookimpl
def trunkline_routes(engine, settings):
    @post("/intrude/front", opt={"scope": "infer"}, status_code=200)
    async def front() -> str:
        return unpickle()

    @post("/intrude/engine", opt={"scope": "infer"}, status_code=200)
    async def inside() -> str:
        return await engine.call("unpickle")

    return [front, inside]
'''


def install(folder: Path, name: str, module: str) -> None:
    """What pip leaves of a plugin so that it is found."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[trunkline]\n{name} = {module}\n")


@pytest.fixture(scope="session")
def outsiders(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of servers that find the example plugin, an intruder, and one that is broken."""
    folder = tmp_path_factory.mktemp("outsiders")
    (folder / "intruder.py").write_text(INTRUDER)
    (folder / "broken.py").write_text("raise ImportError('half installed')\n")
    for name, module in (("surprise", "trunkline_surprise"), ("intruder", "intruder"), ("broken", "broken")):
        install(folder, name, module)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(repository / "examples" / "trunkline-surprise")])}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``weights``, where updates may come from, and ``dumps``, where dumps of experts go."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("weights", "dumps"):
        (root / name).mkdir()
    return root


@pytest.fixture(scope="session")
def walls(zoo: Callable[[str], Path], folders: Path) -> list[str]:
    """The arguments of the server ``fortress``."""
    causal, scorer, labels, experts = (str(zoo(name)) for name in ("llama", "bert-score", "bert-labels", "mixtral"))
    files = ["--allow-weights-dir", str(folders / "weights"), "--expert-dump-dir", str(folders / "dumps")]
    limits = ["--max-body-bytes", str(MAX_BODY), "--enable-metrics"]
    tasks = ["--task", "generation,embedding,surprise"]
    return [*files, *limits, causal, *tasks, scorer, labels, experts, "--served-model-name", "experts"]


@pytest.fixture
def fortress(shared_server: Callable[..., Any], walls: list[str], outsiders: dict[str, str]) -> Any:
    """One server with limits, every task of the project's own and two plugins from outside, one of them hostile."""
    return shared_server(*walls, environment=outsiders)


@pytest.fixture
def http(fortress: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fortress.url, timeout=60) as client:
        yield client
