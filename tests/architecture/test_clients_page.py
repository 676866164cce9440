"""docs/clients.md lists every module of the suite ``clients``, and what its last run recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate_clients.py")


@pytest.fixture(scope="module")
def results(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tests/clients/results.py")


def test_the_page_is_up_to_date(generator: ModuleType, repository: Path) -> None:
    page = (repository / "docs" / "clients.md").read_text()
    assert page == generator.clients(), "run python docs/generate.py"


def test_every_module_is_on_the_page(generator: ModuleType, repository: Path) -> None:
    modules = list((repository / "tests" / "clients").rglob("test_*.py"))
    assert len(modules) >= 13
    page = generator.clients()
    assert [one.stem for one in modules if dict(generator.client_constants(one))["SET"] not in page] == []


def test_a_module_without_the_constants_is_found(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_x.py").write_text("CLIENTS = ('x',)\n")
    monkeypatch.setattr(generator, "TESTS", tmp_path)
    with pytest.raises(LookupError, match=r"test_x\.py has no constant SET"):
        generator.clients()


def report(name: str, outcome: str, when: str) -> Any:
    found = SimpleNamespace(nodeid=name, when=when, passed=False, failed=False)
    setattr(found, outcome, True)
    return found


def test_what_is_recorded(results: ModuleType, tmp_path: Path) -> None:
    """A module keeps its entry if a test of it failed, or didn't run, or if all were skipped."""
    file = tmp_path / "clients.json"
    file.write_text('{"test_b": {"date": "2026-01-01"}}')
    recorder = results.Recorder(file, dict.fromkeys(("test_a", "test_b", "test_c", "test_d"), ("pytest",)))
    tests = {
        "a/test_a.py::test_one[1]": "passed",
        "a/test_a.py::test_one[2]": "passed",
        "a/test_a.py::test_two": "skipped",
        "a/test_b.py::test_three": "passed",
        "a/test_b.py::test_four": "failed",
        "a/test_c.py::test_five": "skipped",
        "a/test_d.py::test_six": "passed",
        "a/test_d.py::test_seven": "not run",
    }
    items = [SimpleNamespace(path=Path(name.partition("::")[0])) for name in tests]
    recorder.pytest_collection_finish(SimpleNamespace(items=items))
    for name, outcome in tests.items():
        if outcome != "not run":
            recorder.pytest_runtest_logreport(report(name, outcome, "call"))
            recorder.pytest_runtest_logreport(report(name, "passed", "teardown"))
    recorder.pytest_sessionfinish()
    entries = json.loads(file.read_text())
    assert entries.keys() == {"test_a", "test_b"}
    assert entries["test_a"]["passed"] == ["test_one"]
    assert entries["test_a"]["versions"] == {"pytest": pytest.__version__}
    assert entries["test_b"] == {"date": "2026-01-01"}


@pytest.mark.parametrize(
    ("folder", "file", "text"),
    [
        ("old", "lib/python3.11/site-packages/some_client-1.5.dist-info/METADATA", "Name: some-client\nVersion: 1.5\n"),
        ("node", "node_modules/@some/client/package.json", '{"version": "2.5"}'),
    ],
)
def test_versions_in_environments(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, file: str, text: str
) -> None:
    place = tmp_path / "environments" / folder
    (place / file).parent.mkdir(parents=True)
    (place / file).write_text(text)
    (place / "complete").touch()
    monkeypatch.setattr(results, "cache_folder", lambda: tmp_path)
    name = "@some/client (npm)" if folder == "node" else "some_client"
    assert results.version_of(name) in text
    assert results.version_of("other-client") is None
