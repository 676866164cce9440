"""Records what ran of the suite ``clients``, by module, for docs/clients.md; see docs/generate_clients.py."""

from __future__ import annotations

import datetime
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest

from trunkline.core.model.sources.catalogue import cache_folder


class Recorder:
    """A plugin of pytest that writes the names of the tests that passed, and the clients' versions, at the end.

    A module's entry in the file is replaced if all of its tests ran or were skipped, one passed and none failed.
    ``clients``: the names of the packages of each module's clients, by the module's name.
    """

    def __init__(self, file: Path, clients: Mapping[str, Sequence[str]]) -> None:
        self.file, self.clients = file, clients
        self.passed: dict[str, list[str]] = defaultdict(list)
        self.failed: set[str] = set()
        self.left: Counter[str] = Counter()  # tests that haven't run, by module

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left.update(item.path.stem for item in session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, name = report.nodeid.partition("::")
        module = Path(path).stem
        self.left[module] -= report.when == "teardown"
        if report.failed:
            self.failed.add(module)
        elif report.passed and report.when == "call":
            test = name.partition("[")[0]
            self.passed[module] += [] if test in self.passed[module] else [test]

    def pytest_sessionfinish(self) -> None:
        entries = json.loads(self.file.read_text()) if self.file.is_file() else {}
        complete = {module for module, left in self.left.items() if left == 0}
        for module in complete & self.passed.keys() - self.failed:
            versions = {name: version_of(name) for name in self.clients[module]}
            today = str(datetime.date.today())
            entries[module] = {"date": today, "versions": versions, "passed": self.passed[module]}
        self.file.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def version_of(name: str) -> str | None:
    """The version of a package: the tests' own, else that in the environment that was used last.

    The same order applies to imports, because environments show the tests' packages. Names that end in `` (npm)`` are
    those of packages for node that have namesakes for Python. None if it is nowhere.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        pass
    marks = sorted((cache_folder() / "environments").glob("*/complete"), key=lambda mark: mark.stat().st_mtime)
    return next((found for mark in reversed(marks) for found in _versions(name, mark.parent)), None)


def _versions(name: str, folder: Path) -> Iterator[str]:
    """Of a package in an environment for Python or node."""
    paths = [str(path) for path in folder.glob("lib/python*/site-packages")]
    yield from (one.version for one in distributions(name=name, path=paths))
    package = folder / "node_modules" / name.removesuffix(" (npm)") / "package.json"
    if package.is_file():
        yield json.loads(package.read_text())["version"]
