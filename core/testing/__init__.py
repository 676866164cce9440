"""The test kit for plugin authors: tiny checkpoints of real architectures; only tests import it.

Also a pytest plugin: with ``pytest_plugins = ["trunkline.core.testing"]`` in the root conftest there is a
fixture ``zoo``, a function from a checkpoint's name to a local folder. Causal language models are
in :data:`ZOO`, base models in :data:`ENCODERS` and :data:`DECODERS`, sequence classification in
:data:`SCORERS`.

With default initialisation, tiny models hide bugs: results hardly depend on the order of the context, and an omitted
bias makes no difference because it is zero. So matrices have standard deviation 1/sqrt(fan in), norms and biases are
random, windows are 8 tokens, soft caps are small enough to have an effect, and rope scaling is on. The final norm is
large, so that logits differ, and embeddings are small, so that tied ones don't just repeat the last token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .causal import BOS, CONTEXT, DENSE, EOS, PAD, VOCABULARY, ZOO
from .chain import write_chain
from .checkpoints import ANSWERERS, DECODERS, ENCODERS, SCORERS, Chain, Checkpoint
from .noise import randomize
from .stages import launch_stage, run_stage
from .tokenizers import CHAT_TEMPLATE, write_tokenizer

__all__ = [
    "ANSWERERS",
    "BOS",
    "CHAT_TEMPLATE",
    "CONTEXT",
    "DECODERS",
    "ENCODERS",
    "EOS",
    "PAD",
    "SCORERS",
    "VOCABULARY",
    "ZOO",
    "Chain",
    "Checkpoint",
    "build_checkpoint",
    "launch_stage",
    "randomize",
    "run_stage",
    "write_chain",
    "write_tokenizer",
    "zoo",
]

_CHECKPOINTS = {**ENCODERS, **DECODERS, **SCORERS, **ANSWERERS}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a checkpoint's name to its folder, built at the first call."""
    root = tmp_path_factory.mktemp("zoo")

    def checkpoint(name: str) -> Path:
        folder = root / name
        return folder if folder.is_dir() else build_checkpoint(name, folder)

    return checkpoint


def build_checkpoint(name: str, folder: Path, **overrides: Any) -> Path:
    """Write the tiny float32 checkpoint ``name`` with a tokenizer to ``folder``; the same bytes on every run.

    ``overrides`` replace values of its config.
    """
    import torch
    import transformers

    made = _described(name)
    cls = getattr(transformers, made.cls)
    config = cls.config_class(**{**made.config, **overrides})
    seed = sorted(ZOO).index(name) if name in ZOO else zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        model = cls(config).float()
        randomize(model, seed)
    model.config.architectures = [made.declares or made.cls]
    model.save_pretrained(folder)
    if made.declares:
        _declare(folder, made.declares)
    write_tokenizer(folder, made.tokenizer)
    if made.chain is not None:
        write_chain(folder, model.config.get_text_config().hidden_size, made.chain, seed % 2**31)
    return folder


def _described(name: str) -> Checkpoint:
    if name in _CHECKPOINTS:
        return _CHECKPOINTS[name]
    architecture, own = ZOO[name]
    return Checkpoint(architecture, {**DENSE, **own})


def _declare(folder: Path, architecture: str) -> None:
    """Change the class in config.json."""
    import json

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [architecture]
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
