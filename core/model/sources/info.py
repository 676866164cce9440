"""Reads the description of a checkpoint from its JSON files, usually without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.core.errors import ModelError
from trunkline.core.model.refusal import explained
from trunkline.core.types import ModelInfo, ModelSource

from .folder import check_folder

if TYPE_CHECKING:
    from trunkline.core.settings import ModelSettings

# Names of the same value in different config classes.
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "emb_dim")
SCALED = ("linear", "dynamic", "yarn")  # rope types whose factor multiplies the context length
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
# Model types with bidirectional attention, unless the config says is_decoder.
# fmt: off
ENCODERS = {
    "albert", "bert", "bert-generation", "big_bird", "camembert", "canine", "convbert", "deberta", "deberta-v2",
    "distilbert", "electra", "data2vec-text", "embedding_gemma2_text", "ernie", "esm", "esmc", "eurobert",
    "flaubert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv3", "lilt",
    "longformer", "luke", "markuplm", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert",
    "nystromformer", "openai_privacy_filter", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "splinter", "squeezebert", "tapas", "tipsv2_text_model", "ultrabert", "visual_bert", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod", "yoso",
}
# Those of them whose positions begin at the padding token's id + 1.
SHIFTED = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}
# fmt: on


@explained
def read_info(source: ModelSource, settings: ModelSettings) -> ModelInfo:
    """Describe the checkpoint in ``source.path``.

    Raises ModelError when its config.json is missing, damaged or names no architecture, and when
    ``settings.context_length`` is more than the model was made for.
    """
    folder = Path(source.path)
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelError(f'{folder / "config.json"} names no architecture; add "architectures": ["…"] to it.')
    text = _text_config(config)
    if any(_first(text, names) is None for names in (CONTEXT, HIDDEN, ("vocab_size",))):
        text = _with_defaults(folder, text, str(architectures[0]), settings.context_length)
    return ModelInfo(
        path=str(folder),
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        context_length=_context_length(text, settings.context_length, source.reference),
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(_first(text, HIDDEN) or 0),
        causal=_is_causal(text),
        num_experts=int(_first(text, EXPERTS) or 0),
        eos_token_ids=_eos_token_ids(folder, text),
        score_rows=_score_rows(str(architectures[0]), text),
        config=config,
    )


def read_config(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} has no config.json, so it is not a transformers checkpoint.")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ModelError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return found


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, which is nested in multimodal configs."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _with_defaults(folder: Path, text: dict[str, Any], architecture: str, asked: int | None) -> dict[str, Any]:
    """Add the defaults of the config class for missing values. Rarely needed, and slow: this imports torch.

    ``asked`` is the user's context length, for models without a limit.
    """
    import transformers
    from transformers import AutoConfig

    from trunkline.core.model.architecture import why_not

    try:
        full = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} is incomplete and its class can't fill it in: {error}") from error
    if reason := why_not(getattr(transformers, architecture, None), full):
        raise ModelError(f"{architecture} can't be served: {reason}")
    values: dict[str, Any] = full.get_text_config().to_dict()
    if _first(values, CONTEXT) is None:
        if asked is None:
            raise ModelError(f"{architecture} has no greatest number of positions; give --context-length.")
        values[CONTEXT[0]] = asked
    if missing := [names[0] for names in (CONTEXT, HIDDEN, ("vocab_size",)) if _first(values, names) is None]:
        raise ModelError(
            f"{architecture} can't be served: neither its config.json nor transformers' {type(full).__name__} has "
            f"{missing[0]}; models without it aren't supported."
        )
    return {**values, **text}


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The value of the first of ``names`` that is a number."""
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _context_length(text: dict[str, Any], asked: int | None, reference: str) -> int:
    limit = _first(text, CONTEXT)
    assert limit is not None  # _with_defaults has set it, or raised
    limit = _scaled(limit, text)
    if text.get("model_type") in SHIFTED and text.get("position_embedding_type", "absolute") == "absolute":
        padding = text.get("pad_token_id")
        limit -= 2 if padding is None else int(padding) + 1  # 1 is the family's default
    if asked is None:
        return limit
    if asked > limit:
        raise ModelError(f"--context-length {asked} is more than the {limit} tokens that {reference} was made for.")
    return asked


def _scaled(limit: int, text: dict[str, Any]) -> int:
    """The context length with rotary scaling; ``limit`` is the config's maximum number of positions.

    Of the types in transformers' modeling_rope_utils, linear, dynamic and yarn scale the length that the model
    was trained with by ``factor``: that is ``original_max_position_embeddings`` where the config has it, even if
    the product is less than ``limit``, else ``limit``. For the other types (llama3, longrope, proportional)
    ``limit`` is the scaled length, and so it is where the parameters differ by kind of layer (Gemma 3). vLLM
    reads yarn, llama3 and longrope in the same way.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"config.json: rope_parameters (or rope_scaling) must be an object, not {rope!r:.80}.")
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in SCALED or not isinstance(factor, int | float):
        return limit
    trained = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or limit
    if not 1 <= trained * factor < math.inf:
        raise ModelError(f"config.json: {trained} positions × the rotary factor {factor} is no context length.")
    return int(trained * factor)


def _is_causal(text: dict[str, Any]) -> bool:
    if text.get("is_causal") is False or text.get("use_bidirectional_attention") is True:
        return False
    return text.get("model_type") not in ENCODERS or bool(text.get("is_decoder"))


def _score_rows(architecture: str, text: dict[str, Any]) -> str:
    """The hidden row that a sequence classification head is applied to; "" for classes without one."""
    if not architecture.endswith("ForSequenceClassification"):
        return ""
    if text.get("model_type") not in ENCODERS:
        return "last"
    return "mean" if text.get("classifier_pooling") == "mean" else "first"


def _eos_token_ids(folder: Path, text: dict[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence ids of all *config.json files in the folder.

    Chat models often have their end-of-turn token only in generation_config.json.
    """
    found: set[int] = set()
    for values in (text, *(_read_json(path) for path in folder.glob("*config.json"))):
        named = values.get("eos_token_id")
        found.update(token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int))
    return tuple(sorted(found))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # these files are optional
    return values if isinstance(values, dict) else {}
