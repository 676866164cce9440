"""Documentation that can be checked, is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from msgspec import Struct

from trunkline.core.config import EngineSettings, ModelSettings, ServerSettings, settings_groups
from trunkline.core.host import Host


@pytest.fixture(scope="module")
def generator(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate.py")


@pytest.mark.parametrize("name", ["plugins", "configuration"])
def test_generated_pages_are_up_to_date(generator: ModuleType, repository: Path, name: str) -> None:
    page = (repository / "docs" / f"{name}.md").read_text()
    assert page == getattr(generator, name)(), "run python docs/generate.py"


def test_links_between_pages_lead_somewhere(repository: Path) -> None:
    for page in (*repository.glob("*.md"), *(repository / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


OWNERS = {
    ServerSettings: ["server", "limits", "_limits", '["server"]'],
    EngineSettings: ["engine", '["engine"]'],
    ModelSettings: ["settings", "own", "old", "self"],
}
OF_PLUGINS = ["settings", "_settings", "[GROUP]"]


def unread(schema: type[Struct], text: str) -> list[str]:
    """Fields that ``text`` nowhere reads off an object of these settings, which code calls by one of OWNERS."""
    owner = "|".join(
        ("" if name[0] == "[" else r"(?<!\w)") + re.escape(name) for name in OWNERS.get(schema, OF_PLUGINS)
    )
    return [name for name in schema.__struct_fields__ if not re.search(rf"(?:{owner})\.{name}\b(?! = )", text)]


def test_every_setting_is_used(sources: dict[str, Any]) -> None:
    """A setting that nothing reads would be a promise that nobody keeps."""
    together = "\n".join(source.text for source in sources.values())
    schemas = [ModelSettings, *(group.schema for group in settings_groups(Host.load()).values())]
    assert len(schemas) >= 6
    assert [f"{schema.__name__}.{name}" for schema in schemas for name in unread(schema, together)] == []


@pytest.mark.parametrize("text", ["model.threads", "engine.threads = 1", 'settings["threads"]', "threads"])
def test_a_setting_that_is_read_off_something_else_is_found(text: str) -> None:
    assert "threads" in unread(EngineSettings, text)
