"""Tokenizers in a process that leaves torch out, as the front does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from trunkline.core.model import tokenizer
from trunkline.core.types import ModelSource

TEXT = "The other line, there: Ünïcode, 数 and\n\n  spaces 123.</s><s>"
FRONT = """
import json, sys
from trunkline.core.model import tokenizer
from trunkline.core.types import ModelSource

tokenizer.import_without_torch()
loaded = tokenizer.load(ModelSource("", sys.argv[1]))
ids = loaded.encode(sys.argv[2])
chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
print(json.dumps([ids, loaded.decode(ids), loaded.all_special_ids, chat, "torch" in sys.modules]))
import torch
"""


def test_without_torch_everything_is_the_same(zoo: Callable[[str], Path]) -> None:
    folder = zoo("llama")
    done = subprocess.run([sys.executable, "-c", FRONT, str(folder), TEXT], capture_output=True, text=True, check=True)
    here: Any = tokenizer.load(ModelSource("", str(folder)))
    ids = here.encode(TEXT)
    chat = here.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert json.loads(done.stdout) == [ids, here.decode(ids), here.all_special_ids, chat, False]
    assert done.stderr == ""


def test_a_torch_that_is_there_stays(zoo: Callable[[str], Path]) -> None:
    import torch

    tokenizer.import_without_torch()
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(zoo: Callable[[str], Path], name: str, special: bool) -> None:
    loaded: Any = tokenizer.load(ModelSource("", str(zoo(name))))
    for text in (TEXT, TEXT * 200, "", " "):
        assert tokenizer.token_ids(loaded, text, special) == loaded.encode(text, add_special_tokens=special)


def test_ids_follow_a_folder_s_settings(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Of its own accord a tokenizer.json cuts and pads, and tokenizer_config.json may split special tokens."""
    shutil.copytree(zoo("bert"), tmp_path, dirs_exist_ok=True)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    lengths = {}
    for split in (False, True):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": split}))
        fresh, other = (tokenizer.load(ModelSource("", str(tmp_path))) for _ in range(2))
        assert fresh is not None
        assert other is not None
        ids = tokenizer.token_ids(fresh, "[SEP] the sea of the other line")
        assert ids == other.encode("[SEP] the sea of the other line")
        lengths[split] = len(ids)
    assert 6 < lengths[False] < lengths[True]


def test_a_tokenizer_of_another_kind() -> None:
    class Letters:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0] * add_special_tokens + [ord(letter) for letter in text]

    letters: Any = Letters()
    assert tokenizer.token_ids(letters, "ab") == [0, 97, 98]
    assert tokenizer.token_ids(letters, "ab", special=False) == [97, 98]


@pytest.mark.field
@pytest.mark.parametrize("typed", ["org/name", "folder", "../x:y", "/models/llama"])
def test_a_path_or_id_stays_as_the_user_typed_it(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "x:y").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert tokenizer.public_path(typed, ModelSource(typed, "/cache/somewhere")) == typed


@pytest.mark.field
@pytest.mark.parametrize("typed", ["demo:smollm2-135m-instruct", "s3://bucket/model"])
def test_what_only_this_server_knows_is_shown_as_its_folder(typed: str) -> None:
    assert tokenizer.public_path(typed, ModelSource(typed, "/cache/somewhere")) == "/cache/somewhere"
