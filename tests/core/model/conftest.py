"""Loaded models of the zoo, each loaded once per backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.model import loader
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import Head, ModelSource
from trunkline.kernels.backend import choose


def full_head() -> Head:
    """Vocabulary scores with everything that any class's forward does after its last matrix."""

    def build(whole: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        config = whole.config
        cap = getattr(config, "final_logit_softcapping", None)
        factor = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

        def apply(hidden: torch.Tensor) -> torch.Tensor:
            scores = whole.lm_head(hidden) * factor
            return torch.tanh(scores / cap) * cap if cap else scores

        return apply

    return Head("scores", build, lambda whole, ids: whole(ids, logits_to_keep=1).logits[:, -1])


def bare_head() -> Head:
    """The matrix alone, which is wrong for some classes."""
    return Head("bare", lambda whole: whole.lm_head, lambda whole, ids: whole(ids, logits_to_keep=1).logits[:, -1])


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded by the test keep transformers' layers."""
    monkeypatch.setattr(loader, "_fuse", lambda _: "")


@pytest.fixture(scope="session")
def load(zoo: Callable[[str], Path]) -> Callable[..., LoadedModel]:
    """``load(name, backend)``: a model of the zoo in float32 with the heads above."""
    loaded: dict[tuple[str, str], LoadedModel] = {}

    def get(name: str, backend: str = "torch_native") -> LoadedModel:
        if (name, backend) not in loaded:
            source = ModelSource(name, str(zoo(name)))
            settings = ModelSettings(model_path=source.path, dtype="float32")
            info = read_info(source, settings)
            heads = [full_head(), bare_head()]
            loaded[name, backend] = loader.load(source, info, settings, heads, choose(backend, "cpu"))
        return loaded[name, backend]

    return get


@pytest.fixture(scope="session")
def reference(zoo: Callable[[str], Path]) -> Callable[[str], Any]:
    """``reference(name)``: the same checkpoint by transformers alone, with eager attention and experts."""
    import transformers

    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = transformers.AutoModelForCausalLM.from_pretrained(
                zoo(name), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
        return loaded[name]

    return get
