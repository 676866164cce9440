"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from .conftest import Source, graph

LAYERS = (
    ("kernels",),
    ("core.types", "core.errors", "core.guard", "core.logs", "core.memory"),
    ("core.hookspecs",),
    ("core.config", "core.host", "core.registry", "core.discovery", "core.settings"),
    ("core.cache", "core.model"),
    ("core.engine",),
    ("core.client",),
    ("core.server",),
    ("core.cluster",),
    ("core.batch_file",),
    ("core.cli", "core.commands"),
    ("core.testing",),
)
FOR_PLUGINS = ("core.types", "core.errors", "core.hookspecs", "core.server.api", "kernels")


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def layer(name: str) -> int:
    """Height of a module; core's own ``__init__`` exports Engine lazily and stands on top."""
    if name == "core":
        return len(LAYERS)
    [height] = [height for height, parts in enumerate(LAYERS) if any(inside(name, part) for part in parts)]
    return height


def violations(edges: dict[str, set[str]]) -> list[str]:
    """Imports that the rule forbids, as "a imports b"."""
    bad = []
    for module, targets in edges.items():
        name = module.removeprefix("trunkline.")
        for target in (target.removeprefix("trunkline.") for target in targets):
            if inside(name, "plugins"):
                own = ".".join(name.split(".")[:2])
                allowed = any(inside(target, part) for part in (*FOR_PLUGINS, own))
            else:
                allowed = not inside(target, "plugins") and layer(target) <= layer(name)
            if not allowed:
                bad.append(f"{name} imports {target}")
    return bad


def cycle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_imports_point_downwards(edges: dict[str, set[str]]) -> None:
    assert violations(edges) == []


def test_no_import_cycles_not_even_lazy_or_for_types(sources: dict[str, Source]) -> None:
    assert cycle(graph(sources, for_types=True)) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("trunkline.kernels.backend", "trunkline.core.types"),
        ("trunkline.core.host", "trunkline.core.engine.loop"),
        ("trunkline.core.server.api", "trunkline.plugins.generation"),
        ("trunkline.plugins.generation", "trunkline.core.engine.messages"),
        ("trunkline.plugins.generation", "trunkline.plugins.other"),
    ],
)
def test_a_forbidden_import_is_found(edges: dict[str, set[str]], module: str, target: str) -> None:
    assert violations({module: {target}}) == [f"{module} imports {target}".replace("trunkline.", "")]


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def misspelled(source: Source, folders: Set[str]) -> list[str]:
    """Imports of ours that climb to a parent folder with dots, or spell out the module's own folder."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom):
            target = node.module or ""
            own = not node.level and target.rpartition(".")[0] == source.package and target not in folders
            if node.level > 1 or own:
                found.append(f"{source.name}, line {node.lineno}")
    return found


def test_absolute_imports_across_folders_relative_ones_inside(sources: dict[str, Source]) -> None:
    folders = {source.package for source in sources.values()}
    assert [place for source in sources.values() for place in misspelled(source, folders)] == []


@pytest.mark.parametrize("line", ["from ..errors import A", "from trunkline.core.engine.lane import Lane"])
def test_a_misspelled_import_is_found(line: str) -> None:
    assert misspelled(Source(Path("lanes.py"), "trunkline.core.engine.lanes", line, ast.parse(line)), set())


def test_heavy_libraries_stay_out_of_cheap_modules(sources: dict[str, Any]) -> None:
    """types, hookspecs, config, host and the CLI are imported by ``trunkline --help``."""
    heavy = {"torch", "transformers", "litestar", "triton", "numba", "uvicorn", "huggingface_hub"}
    cheap = ("types", "errors", "hookspecs", "config", "host", "discovery", "cli", "commands.serve", "commands.flags")
    for source in [one for one in sources.values() if any(inside(one.name, f"core.{name}") for name in cheap)]:
        name, imported = source.name, {target.split(".")[0] for target in source.imports()}
        assert not imported & heavy, name
