"""Core's own plugin: where models, tokenizers and weights come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trunkline.core import model as plugin
from trunkline.core.errors import ModelError
from trunkline.core.model.sources import catalogue
from trunkline.core.testing import ZOO
from trunkline.core.types import ModelSource


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert plugin.trunkline_resolve_model(tmp_path.name) == ModelSource(tmp_path.name, str(tmp_path.resolve()))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="give the folder"):
        plugin.trunkline_resolve_model(str(tmp_path / "model.safetensors"))


def test_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "fetch", lambda reference: tmp_path / reference.removeprefix("demo:"))
    assert plugin.trunkline_resolve_model("demo:x") == ModelSource("demo:x", str(tmp_path / "x"))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.bin" in allow_patterns))
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert plugin.trunkline_resolve_model("owner/name") == ModelSource("owner/name", "/cache/snapshot")
    assert plugin.trunkline_resolve_model("owner/name@v2") == ModelSource("owner/name@v2", "/cache/snapshot")
    assert asked == [("owner/name", None, False), ("owner/name", "v2", False)]


def test_nowhere() -> None:
    with pytest.raises(
        ModelError, match=r"'owner/no-such-name' is not a local folder and can't be downloaded from the hub"
    ):
        plugin.trunkline_resolve_model("owner/no-such-name")
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        plugin.trunkline_resolve_model("no such/na:me/at all")


def test_weights_are_refused_before_the_first_is_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        plugin.trunkline_weights(ModelSource("x", str(tmp_path)))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_tokenizers_of_the_zoo(name: str, zoo: Callable[[str], Path]) -> None:
    tokenizer = plugin.trunkline_tokenizer(ModelSource(name, str(zoo(name))))
    assert tokenizer is not None
    text = "The other line, there: Ünïcode, 数 and\n\n  spaces 123."
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert max(ids) < 512
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s>user: Hi\nassistant: "


def test_no_tokenizer(tmp_path: Path) -> None:
    assert plugin.trunkline_tokenizer(ModelSource("x", str(tmp_path))) is None


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="can't be loaded"):
        plugin.trunkline_tokenizer(ModelSource("x", str(tmp_path)))
