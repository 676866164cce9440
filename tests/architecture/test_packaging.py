"""pyproject.toml agrees with the tree."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

# what a distribution is imported as, where that isn't its own name
IMPORTED_AS = {"google-re2": "re2", "huggingface-hub": "huggingface_hub"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_packages_are_the_tree(project: dict[str, Any], sources: dict[str, Any]) -> None:
    packages = {source.package for source in sources.values()}
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    for package in packages:
        assert package in sources, f"{package} has no __init__.py"


def test_folders_are_mapped(project: dict[str, Any], repository: Path) -> None:
    folders = project["tool"]["setuptools"]["package-dir"]
    for package in project["tool"]["setuptools"]["packages"]:
        top = ".".join(package.split(".")[:2])
        assert (repository / folders[top]).is_dir()


def test_type_checkers_see_the_same_tree(repository: Path) -> None:
    for folder in ("core", "kernels", "plugins"):
        link = repository / ".typing" / "trunkline" / folder
        assert link.is_symlink()
        assert not Path(link.readlink()).is_absolute()
        assert link.resolve() == (repository / folder).resolve()


def test_entry_points_are_modules(project: dict[str, Any], sources: dict[str, Any], repository: Path) -> None:
    points = project["project"]["entry-points"]["trunkline"]
    assert set(points.values()) <= set(sources)
    folders = {path.parent.name for path in (repository / "plugins").glob("*/__init__.py")}
    assert set(points) == {"models", *folders}, "one line a plugin"
    module, _, function = project["project"]["scripts"]["trunkline"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def packages(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line).group().lower() for line in requirements}  # type: ignore[union-attr]


def test_imports_are_declared(project: dict[str, Any], sources: dict[str, Any]) -> None:
    names = packages(project["project"]["dependencies"])
    declared = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}
    test_only = {"pytest"}  # the author's kit is a pytest plugin
    optional = project["project"]["optional-dependencies"]
    extras = {name for extra, lines in optional.items() if extra != "test" for name in packages(lines)}
    imported = {name.split(".")[0] for source in sources.values() for name in source.imports()}
    foreign = imported - set(sys.stdlib_module_names) - {"trunkline"}
    assert foreign <= declared | test_only | extras
    assert declared <= foreign | {"jinja2", "uvloop", "gguf", "tokenizers"}, "a dependency that nothing imports"


def test_a_cpu_needs_no_triton(project: dict[str, Any]) -> None:
    """It is a gigabyte, which only the extras `gpu` and `test` may install."""
    assert not [line for line in project["project"]["dependencies"] if line.startswith("triton")]
    optional = project["project"]["optional-dependencies"]
    assert {extra for extra, lines in optional.items() if any(line.startswith("triton") for line in lines)} == {
        "gpu",
        "test",
    }


def test_version_and_licence(project: dict[str, Any], repository: Path) -> None:
    version = project["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (repository / "LICENSE").read_text()
    assert importlib.metadata.version("trunkline") == version
