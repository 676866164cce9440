"""Tokenizers of every file format, also in a process that leaves torch out, as the front does."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from trunkline.core.errors import ModelError
from trunkline.core.model.sources import tokenizer
from trunkline.core.types import ModelSource

TEXT = "The other line, there: Ünïcode, 数 and\n\n  spaces 123.</s><s>"
FRONT = """
import json, sys
from trunkline.core.model.sources import tokenizer
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


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the vocabularies bpe.model and unigram.model (SentencePiece) and ranks.model (tiktoken)."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for kind in ("bpe", "unigram"):
        SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT, "the quick brown fox", "other lines, here and there"] * 9),
            model_prefix=str(folder / kind),
            vocab_size=340,
            model_type=kind,
            byte_fallback=kind == "bpe",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "ranks.model").write_bytes(b"".join(lines))
    return folder


def write_folder(folder: Path, vocabulary: Path, name: str, model_type: str, tokenizer_class: str = "") -> Path:
    """A checkpoint's folder that has no tokenizer but ``vocabulary``, under ``name``."""
    folder.mkdir()
    shutil.copy(vocabulary, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return folder


@pytest.mark.field
def test_a_sentencepiece_vocabulary_alone_is_a_tokenizer(vocabularies: Path, tmp_path: Path) -> None:
    """The ids are SentencePiece's own; XLM-R has one special token more before the others."""
    cases = (
        ("llama", "LlamaTokenizer", "tokenizer.model", "bpe", 0),
        ("gemma", "", "tokenizer.model", "bpe", 0),
        ("mistral", "", "tokenizer.model", "bpe", 0),
        ("xlm-roberta", "", "sentencepiece.bpe.model", "unigram", 1),
        ("big_bird", "", "spiece.model", "unigram", 0),
    )
    for model_type, tokenizer_class, name, kind, offset in cases:
        folder = write_folder(tmp_path / model_type, vocabularies / f"{kind}.model", name, model_type, tokenizer_class)
        loaded = tokenizer.load(ModelSource("", str(folder)))
        assert loaded is not None
        processor = SentencePieceProcessor(model_file=str(folder / name))
        for text in ("the quick fox", "other lines, there"):
            expected = [number + offset for number in processor.encode(text)]
            if model_type in ("gemma", "mistral"):  # these put no space before a text
                expected = [number + offset for number in processor.encode("a " + text)]
                expected = expected[len(processor.encode("a")) :]
                text = " " + text
            assert tokenizer.token_ids(loaded, text, special=False) == expected, model_type


@pytest.mark.field
def test_a_tiktoken_vocabulary_alone_is_a_tokenizer(vocabularies: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", vocabularies / "ranks.model", "tokenizer.model", "llama")
    loaded = tokenizer.load(ModelSource("", str(folder)))
    assert loaded is not None
    assert tokenizer.token_ids(loaded, "the other the") == [257, *b" o", 257, *b"r", 258]


@pytest.mark.field
def test_a_tekken_vocabulary_alone_is_a_tokenizer(tmp_path: Path) -> None:
    """Mistral's own format, which needs no further package."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    specials = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(("<s>", "</s>"))]
    config = {"pattern": r" ?\p{L}+|\s+", "default_vocab_size": len(tokens) + 2, "default_num_special_tokens": 2}
    (tmp_path / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocabulary, "special_tokens": specials})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    loaded = tokenizer.load(ModelSource("", str(tmp_path)))
    assert loaded is not None
    assert tokenizer.token_ids(loaded, "the the") == [259, 260]


WITHOUT_PACKAGES = """
import json, sys
from trunkline.core.errors import ModelError
from trunkline.core.model.sources import tokenizer
from trunkline.core.types import ModelSource

sys.modules.update({name: None for name in json.loads(sys.argv[1])})
tokenizer.import_without_torch()
try:
    print(tokenizer.load(ModelSource("", sys.argv[2])).encode("the quick fox"))
except ModelError as error:
    print(error)
"""


@pytest.mark.field
@pytest.mark.parametrize(
    ("kind", "blocked", "advice"),
    [
        ("bpe", [], ""),
        ("bpe", ["sentencepiece", "tiktoken", "google"], "pip install sentencepiece protobuf."),
        ("bpe", ["google"], "pip install protobuf."),
        ("ranks", ["tiktoken", "sentencepiece"], "pip install tiktoken."),
    ],
)
def test_the_package_that_is_missing_is_named(
    vocabularies: Path, tmp_path: Path, kind: str, blocked: list[str], advice: str
) -> None:
    """In the front process, which leaves torch out."""
    folder = write_folder(tmp_path / "llama", vocabularies / f"{kind}.model", "tokenizer.model", "llama")
    command = [sys.executable, "-c", WITHOUT_PACKAGES, json.dumps(blocked), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    if advice:
        assert advice in done.stdout
        assert str(folder / "tokenizer.model") in done.stdout
    else:
        loaded: Any = tokenizer.load(ModelSource("", str(folder)))
        assert json.loads(done.stdout) == loaded.encode("the quick fox")


@pytest.mark.field
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\n\x0e\n\x05"])
def test_a_damaged_vocabulary(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"tokenizer\.model is not a SentencePiece vocabulary, or damaged"):
        tokenizer.load(ModelSource("", str(tmp_path)))


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
