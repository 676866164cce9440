"""Code that nobody uses, or only a test, is found: names of modules, and members of classes."""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .unused_members import Members, types_of, unused_members
from .unused_names import unused_names

EXCEPTIONS = {
    "trunkline.core.cli.main": "the command, see pyproject.toml",
    "trunkline.core.cluster.build": "Ray Serve calls it, see docs/scaling.md",
    "trunkline.core.cluster.autoscaling.RequestTokens": "Ray's autoscaler calls it, see docs/scaling.md",
    "trunkline.core.cluster.deployments.EngineReplica.*": "Ray Serve calls them by name",
    "trunkline.core.testing.*": "tests import the test kit",
    "trunkline.kernels.*_reference": "what kernels are compared with",
    "trunkline.kernels.cpu.*.Arguments.*": "compiled code reads them, which has no types",
    "trunkline.core.types.observers.RequestObserver.*": "called by name",
    "trunkline.plugins.generation.hooks.*": "called by name",
    "trunkline.core.registry.Registry.hook_calls": "a test sees that requests call no hooks",
    "trunkline.core.model.loader.PlacedTensor.to": "transformers calls it",
    "trunkline.core.model.sources.tensor_file.StoredTensor.owner": "keeps a file",
}
# Members that were dead once: class -> code. Other classes have members of the same names.
DEAD = {
    "trunkline.core.cache.radix.RadixCache": "def _count(self) -> None:\n    self.tally = 1",
    "trunkline.core.cache.pool.KVPool": "@property\ndef nbytes(self) -> int:\n    return 0",
    "trunkline.core.engine.scheduling.scheduler.Scheduler": "def requests(self) -> list[Any]:\n    return []",
    "trunkline.core.client.client.Client": "@property\ndef live(self) -> int:\n    return 0",
    "trunkline.core.engine.messages.Load": "@property\ndef usage(self) -> float:\n    return self.used / self.slots",
}


@dataclass(frozen=True)
class Code:
    """The modules of the package, of the examples and of documentation. ``packages``: those with others in them."""

    modules: dict[str, tuple[Path, str]]  # path and text
    packages: set[str]

    @property
    def trees(self) -> dict[str, ast.Module]:
        return {module: ast.parse(text) for module, (_, text) in self.modules.items()}


@pytest.fixture(scope="module")
def code(repository: Path, sources: dict[str, Any]) -> Code:
    modules = {name: (repository / ".typing" / place(source), source.text) for name, source in sources.items()}
    packages = {name for name, source in sources.items() if source.path.name == "__init__.py"}
    for path in sorted((repository / "examples").rglob("*.py")):
        parts = path.relative_to(repository / "examples").with_suffix("").parts
        module = ".".join(parts[-2:]).removesuffix(".__init__")
        modules[module] = (path, path.read_text())
        packages |= {module} if path.name == "__init__.py" else set()
    for path in (repository / "docs").glob("*.py"):
        modules[path.stem] = (path, path.read_text())
    for path in (repository / "README.md", *sorted((repository / "docs").glob("*.md"))):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)):
            if "from trunkline.core import Engine" in block:
                modules[f"{path.stem}_{number}"] = (path.with_suffix(f".{number}.py"), block)
    return Code(modules, packages)


def place(source: Any) -> Path:
    """The file of a module below ``.typing``, from where mypy reads it."""
    suffix = ("__init__.py",) if source.path.name == "__init__.py" else ()
    return Path(*source.module.split("."), *suffix) if suffix else Path(*source.module.split(".")).with_suffix(".py")


@pytest.fixture(scope="module")
def members(repository: Path, code: Code, tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The members of all classes, to which those of DEAD are added."""
    cache = tmp_path_factory.mktemp("mypy") / "cache"  # a copy, because the texts aren't those of the files
    if (known := repository / ".mypy_cache").is_dir():
        shutil.copytree(known, cache)
    modules = dict(code.modules)
    for name, added in DEAD.items():
        module = name.rpartition(".")[0]
        path, text = modules[module]
        modules[module] = (path, with_members(text, name.rpartition(".")[2], added))
    return Members(types_of(modules, repository / "pyproject.toml", cache), modules)


def with_members(text: str, name: str, code: str) -> str:
    """A module's text with more code at the end of a class."""
    [found] = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name]
    lines = text.splitlines()
    lines[found.end_lineno : found.end_lineno] = ["", *(f"    {line}" for line in code.splitlines())]
    return "\n".join([*lines, ""])


def shared() -> set[str]:
    """The names of tensors' and arrays' members: attributes of untyped objects with these names are mostly theirs."""
    return {*dir(torch.Tensor), *dir(np.ndarray)}


def is_excepted(found: str) -> bool:
    return any(fnmatch(found, pattern) for pattern in EXCEPTIONS)


def test_every_name_of_a_module_is_used(code: Code) -> None:
    found = unused_names(code.trees, code.packages)
    ours = [name for name in found if name.startswith("trunkline.") and not is_excepted(name)]
    assert ours == []


def test_every_member_of_a_class_is_used(members: Members) -> None:
    """Those that were added are found, and no others."""
    dead = {"RadixCache._count", "RadixCache.tally", "KVPool.nbytes", "Scheduler.requests", "Client.live", "Load.usage"}
    found = unused_members(members, EXCEPTIONS, shared())
    assert {".".join(one.rsplit(".", 2)[1:]) for one in found} == dead, found


def test_every_exception_is_needed(code: Code, members: Members) -> None:
    found = [*unused_names(code.trees, code.packages), *unused_members(members, (), shared())]
    assert [pattern for pattern in EXCEPTIONS if not any(fnmatch(one, pattern) for one in found)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("log = 1", ["a.log"]),
        ("def left_over():\n    return left_over()\n\n\ndef used():\n    pass\n\n\nused()", ["a.left_over"]),
        ("def passed_on():\n    pass", []),
        ("class Typed:\n    pass\n\n\ndef used(one: Typed) -> None:\n    pass\n\n\nprint(used)", []),
    ],
)
def test_names_that_nobody_uses_are_found(text: str, found: list[str]) -> None:
    texts = {"a": text, "package": "from a import passed_on", "b": "from package import passed_on"}
    assert unused_names({module: ast.parse(text) for module, text in texts.items()}, {"package"}) == found
