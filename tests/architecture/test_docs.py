"""Documentation that can be checked, is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trunkline.core.config import EngineSettings, ModelSettings, ServerSettings


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


def test_every_setting_of_core_is_used(sources: dict[str, Any]) -> None:
    """A setting that nothing reads would be a promise that nobody keeps."""
    together = "\n".join(source.text for source in sources.values())
    fields = [*ServerSettings.__struct_fields__, *EngineSettings.__struct_fields__, *ModelSettings.__struct_fields__]
    assert [field for field in fields if not re.search(rf"\.{field}\b", together)] == []
