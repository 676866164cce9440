"""Detects from a checkpoint's files whether it is a reranker, and its activation; needs neither torch nor tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.core.types import ModelInfo, Serves

from .settings import TASK

ON_REQUEST = "To have it rerank by answering yes or no, add `--task rerank` (with its other tasks: `--task a,rerank`)."
README_BYTES = 4096  # the beginning of a model card, with its metadata
LOGIT_SCORE = "LogitScore"  # sentence-transformers' module of causal rerankers


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "Identity": lambda x: x,
    "Sigmoid": sigmoid,
    "Tanh": math.tanh,
    "ReLU": lambda x: max(x, 0.0),
    "Softplus": softplus,
}
"""By the last part of torch's name. All are monotonic, so they don't change a ranking."""


def serves(model: ModelInfo) -> Serves:
    """Whether the checkpoint can rerank; clients get the reasons as error messages."""
    name = model.architecture
    if is_language_model(model):
        if is_reranker(model):
            return Serves(TASK, "default")
        return Serves(TASK, "on_request", f"{name} is not a cross-encoder model. {ON_REQUEST}", detail=ON_REQUEST)
    if not name.endswith("ForSequenceClassification"):
        return Serves(TASK, "no", f"{name} is not a cross-encoder model: it has no score head. Try another model.")
    if (labels := label_count(model.config)) != 1:
        return Serves(TASK, "no", f"{name} is not a cross-encoder model: it has {labels} labels, a reranker has one.")
    if (activation := activation_name(model)) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        return Serves(TASK, "no", f"The checkpoint asks for the activation {activation}; known are {known}.")
    if model.causal and not is_reranker(model):
        reason = "is not a cross-encoder model by default; add `--task rerank` to score pairs of texts with it."
        return Serves(TASK, "on_request", f"{name} {reason}")
    return Serves(TASK, "default")


def is_language_model(model: ModelInfo) -> bool:
    """Whether it scores by the logits of answer tokens."""
    return model.causal and model.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def label_count(config: dict[str, Any]) -> int:
    """Number of outputs of the score head, by the rules of transformers' config classes."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    count = config.get("num_labels", config.get("_num_labels"))
    return count if isinstance(count, int) else 2


def activation_name(model: ModelInfo) -> str:
    """The activation for the logit that the checkpoint's files name, else ``Identity``."""
    own = model.config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = named or model.config.get("sbert_ce_default_activation_function")
    named = named or _read_json(Path(model.path) / "config_sentence_transformers.json").get("activation_fn")
    return str(named).rsplit(".", 1)[-1] if named else "Identity"


def is_reranker(model: ModelInfo) -> bool:
    """Whether a causal model was trained to rerank, according to its name, its model card or its files."""
    folder = Path(model.path)
    return (
        any("rerank" in name.lower() for name in _names(model, folder))
        or "pipeline_tag: text-ranking" in _read_text(folder / "README.md", README_BYTES)
        or logit_score(folder) is not None
        or "<Document>" in (template := chat_template_in(folder))
        or knows_pair_roles(template)
    )


def logit_score(folder: Path) -> tuple[int, int | None] | None:
    """Ids of the answer tokens for relevant and irrelevant in sentence-transformers' files; None without them."""
    modules = _read_json(folder / "modules.json", list)
    for module in modules:
        if isinstance(module, dict) and str(module.get("type", "")).endswith(LOGIT_SCORE):
            values = _read_json(folder / str(module.get("path", "")) / "config.json")
            yes, no = values.get("true_token_id"), values.get("false_token_id")
            if isinstance(yes, int) and (no is None or isinstance(no, int)):
                return yes, no
    return None


def knows_pair_roles(template: str) -> bool:
    """Whether a chat template handles the roles ``query`` and ``document``."""
    return all(f"'{role}'" in template or f'"{role}"' in template for role in ("query", "document"))


def chat_template_in(folder: Path) -> str:
    """The folder's chat template, "" when it has none."""
    if template := _read_text(folder / "chat_template.jinja"):
        return template
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else ""


def _names(model: ModelInfo, folder: Path) -> list[str]:
    """Names of the checkpoint: its folder, its entry in the hub's cache, ``_name_or_path`` in its config."""
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return [folder.name, cached, str(model.config.get("_name_or_path", ""))]


def _read_text(path: Path, size: int = -1) -> str:
    """The beginning of an optional file, "" if it doesn't exist."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(size)
    except OSError:
        return ""


def _read_json(path: Path, kind: type = dict) -> Any:
    """An optional JSON file; an empty value if it doesn't exist, is damaged or has another type."""
    try:
        values = json.loads(_read_text(path))
    except ValueError:
        return kind()
    return values if isinstance(values, kind) else kind()
