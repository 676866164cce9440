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

import gc
import importlib.util
import json
import random
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

pytest_plugins = ["trunkline.core.testing"]  # the fixture ``zoo``

hypothesis.settings.register_profile("trunkline", deadline=None, print_blob=True)
hypothesis.settings.load_profile("trunkline")

ROOT = Path(__file__).resolve().parent.parent
SUITES: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["trunkline"]["suites"]


@dataclass
class Suite:
    """The slow suite that is run: ``--suite NAME``, started by tests/suites.py.

    ``seconds`` is its budget, None for no limit; ``seed`` chooses the sample of a suite that is larger than
    its budget. ``notes`` are shown in the summary.
    """

    name: str | None
    seed: int
    seconds: float | None
    began: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float("inf") if self.seconds is None else self.seconds - (time.monotonic() - self.began)

    @property
    def random(self) -> random.Random:
        """A new generator from the seed: the same numbers at every call."""
        return random.Random(self.seed)


FAILURE = 6000  # characters of a failure that are printed at once


class SuiteReport:
    """Writes what has run so far after every test, and failures at once: a suite that is killed prints no summary."""

    def __init__(self, path: Path, suite: Suite, config: pytest.Config) -> None:
        self.path, self.suite, self.config = path, suite, config
        self.counts: dict[str, Any] = {"collected": 0, "passed": 0, "failed": 0, "skipped": 0, "stopped": False}
        self.reasons: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.counts["collected"] = len(session.items)
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons.add(str(report.longrepr[2]).removeprefix("Skipped: "))
        if report.failed:
            self.suite.notes.append(f"failed: {report.nodeid}")
            terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n{report.nodeid} failed ({report.when}):\n{report.longreprtext[-FAILURE:]}")
        self._write()

    def pytest_runtest_logfinish(self) -> None:
        if self.suite.left <= 0:
            self.counts["stopped"] = True
            self._write()
            pytest.exit("the suite's budget is used up", returncode=0)

    def _write(self) -> None:
        self.path.write_text(json.dumps({**self.counts, "reasons": sorted(self.reasons), "notes": self.suite.notes}))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=list(SUITES), help="run this slow suite instead of the ordinary tests")


def pytest_configure(config: pytest.Config) -> None:
    for name, about in SUITES.items():
        config.addinivalue_line("markers", f"{name}: slow suite of {about['minutes']} minutes: {about['about']}")
    seconds = os.environ.get("TRUNKLINE_SUITE_SECONDS")
    seed = int(os.environ.get("TRUNKLINE_SUITE_SEED", "0"))
    suite = Suite(config.getoption("--suite"), seed, float(seconds) if seconds else None)
    config.stash[SUITE] = suite
    if path := os.environ.get("TRUNKLINE_SUITE_REPORT"):
        config.pluginmanager.register(SuiteReport(Path(path), suite, config))
        # In a background job SIGINT is ignored, and this process would inherit that; the runner interrupts by it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Triton's extension module lists every object that outlives it, so those that are frozen, see below."""
    if "triton" in sys.modules:
        gc.unfreeze()
        gc.collect()


SUITE = pytest.StashKey[Suite]()
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remember that a test has failed, for the fixtures that clear up after it; make what it printed printable."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    # What was captured goes to another process in UTF-8, which has no lone surrogates.
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the chosen suite; without one, those that belong to no suite."""
    chosen = config.getoption("--suite")
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        own = [mark.name for mark in item.iter_markers() if mark.name in SUITES]
        (kept if (chosen in own if chosen else not own) else left_out).append(item)
    if chosen:  # a suite that is cut off doesn't always leave out the same files
        files = sorted({item.path for item in kept})
        random.Random(config.stash[SUITE].seed).shuffle(files)
        kept.sort(key=lambda item: files.index(item.path))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """Exempt what has been imported by now from garbage collection: a full one took half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    """The slow suite that is run: its seed and what is left of its budget."""
    return request.config.stash[SUITE]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def other(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a checkpoint's name to a copy with other numbers in every tensor."""
    from safetensors.torch import load_file, save_file  # and so torch, which not every run of pytest needs

    root = tmp_path_factory.mktemp("other")

    def checkpoint(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            shutil.copytree(zoo(name), folder)
            tensors = load_file(folder / "model.safetensors")
            changed = {key: (tensor.roll(7, -1) * 0.9).contiguous() for key, tensor in tensors.items()}
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return folder

    return checkpoint


@pytest.fixture(scope="session")
def load_script(repository: Path) -> Callable[[str], ModuleType]:
    """A function from a path in the project, of a file that is in no package, to its module."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", repository / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def live_server(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The module of live servers."""
    return load_script("tests/live_server.py")


@pytest.fixture(scope="session")
def servers(live_server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The servers that tests share, see tests/live_server.py; for fixtures that remember what one of them said."""
    shared = live_server.SharedServers(lambda: tmp_path_factory.mktemp("live") / "log")
    yield shared
    shared.close()


@pytest.fixture
def shared_server(request: pytest.FixtureRequest, servers: Any) -> Iterator[Callable[..., Any]]:
    """``shared_server("--flag", "value")``: a server for all tests that leave it as they found it.

    A test that fails may not have: the servers that it was given are closed.
    """
    used: list[Any] = []

    def share(*arguments: str, environment: dict[str, str] | None = None) -> Any:
        used.append(servers(*arguments, environment=environment))
        return used[-1]

    yield share
    if request.node.stash.get(FAILED, False):
        for server in used:
            servers.discard(server)
