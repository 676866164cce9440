"""Other projects' clients, unmodified, each in a virtual environment of its own, and the server that they talk to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.catalogue import fetch

HERE = Path(__file__).parent
MODEL, VECTORS = "demo:smollm2-135m-instruct", "demo:all-minilm-l6-v2"
SECONDS = 300  # for one program of a client
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "clients.json"
ORDER = ("test_openai", "test_langchain", "test_litellm", "test_llama_index", "test_huggingface_hub", "test_embedding")
"""The modules that run first: those of the most used clients. The others follow in the order of the suite's seed."""


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
node_packages = load(HERE / "node_packages.py")
SGLANG = environments.Environment(
    "sglang",
    requirements=(
        "aiohttp", "datasets", "ipython", "msgspec", "numpy", "orjson", "pillow", "pybase64", "pydantic", "requests",
        "tqdm", "transformers",
    ),
    bare=("sglang==0.5.23",),  # its dependencies are those of a server with CUDA
)  # fmt: skip
LM_EVAL = environments.Environment("lm-eval", requirements=("lm_eval[api]>=0.4.13,<0.5", "accelerate"))
MTEB = environments.Environment("mteb", requirements=("mteb[openai]==2.26.24",))
GUIDELLM = environments.Environment("guidellm", requirements=("guidellm==0.8.1",))
AIPERF = environments.Environment("aiperf", requirements=("aiperf==0.13.0",))


CLIENTS: dict[str, tuple[str, ...]] = {}
"""The packages of each module's clients, by the module's name; see docs/generate_clients.py."""


def pytest_configure(config: pytest.Config) -> None:
    """Record what runs, if the suite has no limit and all tests of the modules are chosen."""
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    if config.getoption("--suite") == "clients" and "TRUNKLINE_SUITE_SECONDS" not in os.environ and not chosen:
        config.pluginmanager.register(load(HERE / "results.py").Recorder(RESULTS, CLIENTS))


@pytest.hookimpl(trylast=True)  # after the suite's own order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The most used clients first."""
    for item in items:
        if HERE in item.path.parents and isinstance(item, pytest.Function):
            CLIENTS[item.path.stem] = item.module.CLIENTS
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))


def model_folder(name: str) -> Path:
    try:
        return fetch(name)
    except ModelError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the demo model."""
    return model_folder(MODEL)


def serve(live_server: ModuleType, log: Path, *arguments: str) -> Iterator[Any]:
    live = live_server.LiveServer([*arguments, "--dtype", "float32"], log)
    live.wait()
    yield live
    live.close()


@pytest.fixture(scope="session")
def server(demo: Path, live_server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A live server of the demo model in float32, so that its numbers compare with those of transformers.

    The model's own chat template doesn't take tools; the one that is given does.
    """
    log = tmp_path_factory.mktemp("live") / "log"
    yield from serve(live_server, log, MODEL, "--chat-template", str(HERE / "hermes.jinja"))


@pytest.fixture(scope="session")
def vector_demo() -> Path:
    """The folder of the demo model for embeddings."""
    return model_folder(VECTORS)


@pytest.fixture(scope="session")
def vector_server(
    vector_demo: Path, live_server: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A live server of the demo model for embeddings, in float32."""
    yield from serve(live_server, tmp_path_factory.mktemp("vectors") / "log", VECTORS)


@pytest.fixture(scope="session")
def vectors_of(vector_server: Any) -> Callable[[list[str]], list[list[float]]]:
    """A function from texts to their vectors by the native route."""

    def encode(texts: list[str]) -> list[list[float]]:
        answer = httpx.post(f"{vector_server.url}/encode", json={"text": texts}, timeout=60)
        return [record["embedding"] for record in answer.json()]

    return encode


@pytest.fixture(scope="session")
def generated(demo: Path, server: Any) -> Callable[..., dict[str, Any]]:
    """A function from a text or a chat to the greedy reply of the native route, ``{"text": …, "meta_info": …}``.

    The prompt of a chat is made by the checkpoint's own template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo)

    def generate(prompt: str | list[dict[str, str]], new_tokens: int = 12) -> dict[str, Any]:
        if not isinstance(prompt, str):
            prompt = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return generate


@pytest.fixture(scope="session")
def reference(demo: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and float32 model of the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(demo), AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


Run = Callable[..., str]


def runner(client: Any, home: Path) -> Run:
    """``run("-m", "module", "--flag")`` runs the client's interpreter and returns its standard output."""
    try:
        python = environments.python_of(client)
    except environments.Unavailable as exc:
        pytest.skip(str(exc))
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home)}

    def run(*arguments: str, cwd: Path = HERE) -> str:
        return run_python(python, arguments, own, cwd)

    return run


def run_python(python: Path, arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path = HERE) -> str:
    """The standard output of a Python program, which must succeed."""
    done = subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-20_000:]
    return done.stdout


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(SGLANG, tmp_path_factory.mktemp("sglang"))


@pytest.fixture(scope="session")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(LM_EVAL, tmp_path_factory.mktemp("lm-eval"))


@pytest.fixture(scope="session")
def mteb(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(MTEB, tmp_path_factory.mktemp("mteb"))


@pytest.fixture(scope="session")
def guidellm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(GUIDELLM, tmp_path_factory.mktemp("guidellm"))


@pytest.fixture(scope="session")
def aiperf(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Offline, it takes tokenizers only from the cache of the hub: the demo model's is there as ``trunkline/demo``."""
    home = tmp_path_factory.mktemp("aiperf")
    cached = home / "hub" / "models--trunkline--demo"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(demo)
    return runner(AIPERF, home)


@pytest.fixture(scope="session")
def javascript() -> Callable[..., Any]:
    """``javascript(packages, program, "argument")`` runs a program from ``programs/``; the JSON that it prints."""

    def run(packages: tuple[str, ...], program: str, *arguments: str) -> Any:
        try:
            folder = node_packages.folder_of(*packages)
        except node_packages.Unavailable as exc:
            pytest.skip(str(exc))
        source = (HERE / "programs" / program).read_text()
        command = ["node", "--input-type=module", "-e", source, *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-20_000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``installed("name", "requirement", …)`` makes an environment: a function that runs its interpreter."""

    def install(name: str, *requirements: str) -> Run:
        return runner(environments.Environment(name, requirements), tmp_path_factory.mktemp(name))

    return install


@pytest.fixture(scope="session")
def online() -> Run:
    """Runs the tests' own interpreter; offline, huggingface_hub sends nothing to any machine."""
    return lambda *arguments: run_python(Path(sys.executable), arguments, {"HF_HUB_OFFLINE": "0"})
