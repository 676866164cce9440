"""Documentation that can be checked, is."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from msgspec import Struct

from trunkline.core.config import settings_groups
from trunkline.core.host import Host
from trunkline.core.server import api
from trunkline.core.settings import EngineSettings, ModelSettings, ServerSettings
from trunkline.plugins.rerank.settings import RerankSettings


@pytest.fixture(scope="module")
def generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate.py")


@pytest.fixture(scope="module")
def map_generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate_map.py")


@pytest.mark.parametrize("name", ["plugins", "configuration", "fields"])
def test_generated_pages_are_up_to_date(generator: ModuleType, repository: Path, name: str) -> None:
    page = (repository / "docs" / f"{name}.md").read_text()
    assert page == getattr(generator, name)(), "run python docs/generate.py"


@pytest.mark.parametrize("name", ["architecture", "server_api"])
def test_pages_made_of_docstrings_are_up_to_date(map_generator: ModuleType, repository: Path, name: str) -> None:
    page = (repository / "docs" / f"{name}.md").read_text()
    assert page == getattr(map_generator, name)(), "run python docs/generate.py"


@pytest.fixture(scope="module")
def reliability_generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate_reliability.py")


def test_the_fault_matrix_is_up_to_date(reliability_generator: ModuleType, repository: Path) -> None:
    page = (repository / "docs" / "reliability.md").read_text()
    assert page == reliability_generator.reliability(), "run python docs/generate.py"


def test_everything_in_the_map_and_in_the_api_is_documented(map_generator: ModuleType, sources: dict[str, Any]) -> None:
    mapped = [one for one in sources.values() if one.name.startswith("core") or one.path.name == "__init__.py"]
    assert [one.name for one in mapped if not ast.get_docstring(one.tree)] == []
    exported = dict(map_generator.exports())
    assert exported.keys() == set(api.__all__)
    assert [name for name, module in exported.items() if not map_generator.documentation(name, module)[1]] == []


DOCUMENTED = ("core.types", "core.hookspecs", "core.server.api", "core.testing", "kernels")


def undocumented(tree: ast.AST, path: str) -> list[str]:
    """Public functions, classes and methods without docstring."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            found += [] if ast.get_docstring(node) else [f"{path}.{node.name}"]
            found += undocumented(node, f"{path}.{node.name}") if isinstance(node, ast.ClassDef) else []
    return found


def test_what_plugins_import_has_docstrings(sources: dict[str, Any]) -> None:
    """The operations in kernels/ too, though not the compiled code below."""
    offered = [one for one in sources.values() if one.name in DOCUMENTED or one.name.rpartition(".")[0] in DOCUMENTED]
    assert len(offered) > 30
    assert [name for one in offered for name in undocumented(one.tree, one.name)] == []


def test_a_method_without_docstring_is_found() -> None:
    tree = ast.parse("class A:\n    'About.'\n    def b(self): ...\n    def _c(self): ...\ndef d(): 'About.'")
    assert undocumented(tree, "m") == ["m.A.b"]


def defined(tree: ast.AST, name: str) -> bool:
    """Is there a function or class of this name in a file, or ``Class.method``?"""
    first, _, rest = name.partition(".")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == first]
    return any(not rest or defined(node, rest) for node in found)


def missing(page: str, root: Path) -> list[str]:
    """The names that a page gives as `file.py: function` and that aren't there."""
    return [
        f"{file}: {name}"
        for file, name in re.findall(r"`([\w/.]+\.py): ([\w.]+)`", page)
        if not (root / file).is_file() or not defined(ast.parse((root / file).read_text()), name)
    ]


def test_the_path_of_a_request_exists(repository: Path) -> None:
    page = (repository / "docs" / "architecture.md").read_text()
    assert page.count(".py: ") >= 25
    assert missing(page, repository) == []


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def b(self): ...\ndef c(): ...\n")
    page = "`a.py: A.b`, `a.py: c`, `a.py: A.c`, `b.py: c`, `a.py: d`"
    assert missing(page, tmp_path) == ["a.py: A.c", "b.py: c", "a.py: d"]


def test_no_page_has_the_marks_of_a_merge(repository: Path) -> None:
    for page in (*repository.glob("*.md"), *(repository / "docs").glob("*.md")):
        assert not re.search(r"^(<{7}|={7}|>{7})", page.read_text(), re.MULTILINE), page.name


def test_files_that_pages_name_exist(repository: Path) -> None:
    """Paths of our folders in backticks; those in tables of tests begin below tests/."""
    roots = [repository, repository / "tests", repository / "tests" / "api"]
    for page in (*repository.glob("*.md"), *(repository / "docs").glob("*.md")):
        named = set(
            re.findall(
                r"`((?:core|kernels|plugins|tests|benchmarks|examples|security)/[\w/.-]+\.\w+)[`:]", page.read_text()
            )
        )
        lost = [name for name in named if not any((root / name).exists() for root in roots)]
        assert lost == [], page.name


def anchors(text: str) -> list[str]:
    """The anchors of a page: ids of its elements, and GitHub's of its headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    return re.findall(r'id="([^"]+)"', prose) + slugs


def broken_links(pages: dict[Path, str]) -> list[str]:
    """Links to files or anchors that don't exist, and anchors that occur twice. ``pages``: text by path."""
    problems = []
    for page, text in pages.items():
        own = anchors(text)
        problems += [f"{page.name} has two anchors {name!r}" for name in sorted(set(own)) if own.count(name) > 1]
        for file, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", text):
            target = (page.parent / file).resolve() if file else page
            if not target.exists():
                problems.append(f"{page.name} links to {file}")
            elif anchor and anchor not in anchors(pages.get(target, "")):
                problems.append(f"{page.name} links to {file}#{anchor}")
    return problems


def test_links_between_pages_lead_somewhere(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]
    assert broken_links({page.resolve(): page.read_text() for page in pages}) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).touch()
    headings = "# A\n## Two words?\n```\n# Two words\n```\n"
    a = f"{headings}[1](b.md) [2](b.md#yes) [3](b.md#no) [4](c.md) [5](#two-words) [6](#x)"
    found = broken_links({tmp_path / "a.md": a, tmp_path / "b.md": '# B\n# B\n<a id="yes"></a>'})
    assert found == ["a.md links to b.md#no", "a.md links to c.md", "a.md links to #x", "b.md has two anchors 'b'"]


OWNERS = {
    ServerSettings: ["server", "limits", "_limits", '["server"]'],
    EngineSettings: ["engine", '["engine"]'],
    ModelSettings: ["settings", "model_settings", "own", "old"],
}
OF_PLUGINS = ["settings", "_settings", "[GROUP]", "settings(served)", "settings(job.served)"]


def unread(schema: type[Struct], files: dict[str, str]) -> list[str]:
    """Settings that no file (name -> text) reads from an object that code names as in OWNERS.

    Settings of a plugin must be read in the plugin's folder. In the file of the struct, ``self`` is such an object.
    """
    module = schema.__module__.removeprefix("trunkline.")
    package = module.rpartition(".")[0]
    left = list(schema.__struct_fields__)
    for name, text in files.items():
        if package.startswith("plugins.") and not f"{name}.".startswith(f"{package}."):
            continue
        objects = [*OWNERS.get(schema, OF_PLUGINS), *(["self"] if name == module else [])]
        owner = "|".join(("" if one[0] == "[" else r"(?<!\w)") + re.escape(one) for one in objects)
        left = [field for field in left if not re.search(rf"(?:{owner})\.{field}\b(?! = )", text)]
    return left


def test_every_setting_is_used(sources: dict[str, Any]) -> None:
    """A setting that no code reads would have no effect."""
    files = {source.name: source.text for source in sources.values()}
    groups = settings_groups(Host.load()).values()
    schemas = [ModelSettings, *(group.schema for group in groups if group.schema.__module__ in sources)]
    assert len(schemas) >= 6
    assert [f"{schema.__name__}.{name}" for schema in schemas for name in unread(schema, files)] == []


@pytest.mark.parametrize("text", ["model.threads", "engine.threads = 1", 'settings["threads"]', "threads"])
def test_a_setting_that_is_read_from_another_object_is_found(text: str) -> None:
    assert "threads" in unread(EngineSettings, {"core.engine.startup": text})
    assert "threads" not in unread(EngineSettings, {"core.engine.startup": f"{text}; engine.threads"})


@pytest.mark.parametrize(("file", "count"), [("core.settings", 0), ("core.model.loader", 1)])
def test_self_is_a_settings_object_in_its_own_file_only(file: str, count: int) -> None:
    assert unread(ModelSettings, {file: "self.model_path"}).count("model_path") == count


@pytest.mark.parametrize(("file", "count"), [("plugins.rerank.routes", 0), ("plugins.reranking", 1), ("core.app", 1)])
def test_a_plugin_s_settings_are_read_in_its_folder(file: str, count: int) -> None:
    assert unread(RerankSettings, {file: "settings.rerank_format"}).count("rerank_format") == count
