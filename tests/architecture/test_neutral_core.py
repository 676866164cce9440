"""Core knows no task by name: adding one changes no file of core."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

# Task names, and the folders of plugins. "embedding" is also what a layer is called, so that word is
# sought in quotes only; names that the HTTP contract or transformers prescribe don't match: is_generation,
# generation_config.json, /health_generate, the model type bert-generation, SGLang's answers about pauses.
WORDS = re.compile(
    r"(?<![\w/])(?<!bert-)(generation|generate|rerank|reranking|classify|moe_stats)(?![\w])"
    r"(?!_config| (?:paused|continued) successfully)|(['\"])(embedding|reward)\2",
    re.IGNORECASE,
)


def mentions(text: str) -> list[str]:
    return [match.group() for match in WORDS.finditer(text)]


def test_core_names_no_task(sources: dict[str, Any]) -> None:
    found = {
        source.name: mentions(source.text)
        for source in sources.values()
        if source.name.split(".")[0] == "core" and mentions(source.text)
    }
    assert found == {}


def test_every_plugin_folder_is_sought(repository: Path) -> None:
    for folder in (repository / "plugins").iterdir():
        if (folder / "__init__.py").exists():
            assert mentions(f'"{folder.name}"'), f"add {folder.name} to WORDS"


@pytest.mark.parametrize(
    "text", ['stages["generation"]', "if task == 'embedding':", "# for the rerank task", "generation paused"]
)
def test_a_mention_is_found(text: str) -> None:
    assert mentions(text)


@pytest.mark.parametrize(
    "text",
    [
        *("generation_config.json", "/health_generate", "is_generation", "token embedding", "bert-generation"),
        *("/pause_generation", "Generation paused successfully."),
    ],
)
def test_prescribed_names_are_no_mention(text: str) -> None:
    assert not mentions(text)
