"""Core knows no task by name: adding one changes no file of core."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

# Words of the tasks, in any case, also as parts of names in snake_case. A layer of a model is called "embedding", too,
# so that word is sought in quotes and before a few others only.
WORDS = re.compile(
    r"(?<![A-Za-z])(?i:generat(?:e|es|ed|ing|ion)|chat[ _-]completions?|sampling|rerank(?:s|ed|er|ers|ing)?|rewards?|"
    r"classif(?:y|ies|ied|ier|iers|ication)|moe_stats|(?:is[ _-])embedding|embedding[ _-](?:models?|tasks?|stages?))"
    r"(?![a-z])|(?P<quote>['\"])(?:embedding|reward)(?P=quote)"
)

# What others prescribe.
EXCEPTIONS = {
    "SGLang's API": (
        r"\b(is_generation|preferred_sampling_params|health_generate|(pause|continue)_generation)\b|"
        r"Generation (paused|continued) successfully"
    ),
    "SGLang's flags that have no setting here": r"--sampling-backend",
    "transformers' names": (
        r"\b(generation_config|GenerationConfig|bert-generation|add_generation_prompt|classifier_pooling|"
        r"multi_label_classification)\b|[.'\"`](pre_)?classifier\b"
    ),
    "the classes that have core's head 'score'": r"[Ss]equence classification",
    "prometheus_client": r"\bgenerate_latest\b",
}
PRESCRIBED = re.compile("|".join(EXCEPTIONS.values()))


def mentions(text: str, settings: tuple[str, ...] = ()) -> list[str]:
    """The words of tasks in a text, and the names of plugins' ``settings``, as fields and as flags."""
    text = PRESCRIBED.sub("", text)
    names = re.compile(rf"\b({'|'.join(settings)})\b") if settings else None
    found = [match.group() for match in WORDS.finditer(text)]
    return found + (names.findall(text.replace("-", "_")) if names else [])


@pytest.fixture(scope="module")
def settings(repository: Path) -> tuple[str, ...]:
    """The names of the plugins' settings; single words ("pooling") are left out, since they have other meanings."""
    names: list[str] = []
    for path in sorted((repository / "plugins").glob("*/settings.py")):
        module = importlib.import_module(f"trunkline.plugins.{path.parent.name}.settings")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__:
                names += value.__struct_fields__
    assert len(names) > 10
    return tuple(name for name in names if "_" in name)


def test_core_names_no_task(sources: dict[str, Any], settings: tuple[str, ...]) -> None:
    found = {
        source.name: mentions(source.text, settings)
        for source in sources.values()
        if source.name.split(".")[0] == "core" and mentions(source.text, settings)
    }
    assert found == {}


def test_every_plugin_folder_is_sought(repository: Path) -> None:
    for folder in (repository / "plugins").iterdir():
        if (folder / "__init__.py").exists():
            assert mentions(f'"{folder.name}"'), f"add {folder.name} to WORDS"


def test_every_exception_is_needed(sources: dict[str, Any]) -> None:
    core = "\n".join(source.text for source in sources.values() if source.name.split(".")[0] == "core")
    for why, pattern in EXCEPTIONS.items():
        assert any(WORDS.search(match.group()) for match in re.finditer(pattern, core)), why


@pytest.mark.parametrize(
    "text",
    [
        *('stages["generation"]', "if task == 'embedding':", "# for the rerank task", "generation paused"),
        *("an embedding model", "is_embedding = True", "sampling_params", "for rerankers", "a reward stage"),
        *("classification of texts", "a classifier's labels", "SAMPLING = 1", "class GenerationBody"),
        *("add `--is-embedding`", "chat completions", "one is generated"),
    ],
)
def test_a_mention_is_found(text: str) -> None:
    assert mentions(text)


@pytest.mark.parametrize("text", ["see --rerank-format", "config.max_n", "embedding_truncate"])
def test_a_plugins_setting_is_found(text: str, settings: tuple[str, ...]) -> None:
    assert mentions(text, settings)


@pytest.mark.parametrize(
    "text",
    [
        *("generation_config.json", "/health_generate", "is_generation", "token embedding", "bert-generation"),
        *("/pause_generation", "Generation paused successfully.", "LlamaForSequenceClassification", "a generator"),
    ],
)
def test_prescribed_names_are_no_mention(text: str) -> None:
    assert not mentions(text)
