"""Reads from a checkpoint's folder how its vectors are computed: from sentence-transformers' files, else a default.

Needs neither torch nor weights; both processes use it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from trunkline.core.errors import ModelError
from trunkline.core.types import ModelInfo, Serves

from .settings import TASK, EmbeddingSettings

# In the order in which sentence-transformers joins the vectors of several modes.
LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(LEGACY_MODES.values())
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Activations of Dense that take no arguments; torch's class names.
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Mish", "ReLU6", "Softsign")

# SGLang's text, which clients compare, also for other tasks than this one.
NOT_EMBEDDING_MODEL = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)


class Module(Struct, frozen=True):
    """A module after pooling. ``kind`` is Dense, LayerNorm or Normalize; ``folder`` has its weights."""

    kind: str
    folder: str = ""
    width: int = 0  # length of its output vectors
    config: dict[str, Any] = {}


class Recipe(Struct, frozen=True, kw_only=True):
    """How a text is prepared, and how its hidden rows become a vector.

    ``modes``: pooling modes, whose results are concatenated. ``normalize``: whether the last step scales vectors to
    length 1 (it isn't in ``modules``, because requests can switch it off). ``matryoshka``: the lengths to which
    vectors may be shortened, () = any, None = none.
    """

    modes: tuple[str, ...]
    normalize: bool
    dimensions: int
    modules: tuple[Module, ...] = ()
    include_prompt: bool = True
    max_length: int | None = None  # tokens
    lower_case: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None  # name of the default prompt
    matryoshka: tuple[int, ...] | None = None
    similarity: str = "cosine"

    def facts(self) -> dict[str, Any]:
        """Keys for /model_info."""
        return {
            "embedding_dimension": self.dimensions,
            "pooling": list(self.modes),
            "normalized": self.normalize,
            "max_seq_length": self.max_length,
            "prompts": self.prompts,
            "default_prompt_name": self.default_prompt,
            "similarity_fn_name": self.similarity,
            "is_matryoshka": self.matryoshka is not None,
            "matryoshka_dimensions": list(self.matryoshka or ()),
        }


def serves(info: ModelInfo, settings: EmbeddingSettings) -> Serves:
    """Whether a checkpoint can serve embeddings, and whether it does by default."""
    name = info.architecture
    if name.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")):
        reason = f"{name} gives labels or scores, not embeddings: see /classify and /v1/rerank, or serve another model."
        return Serves(TASK, "no", reason)
    try:
        read_recipe(info, settings)
    except ModelError as error:
        return Serves(TASK, "no", str(error))
    headless = name.endswith("Model") and not name.endswith("LMHeadModel")
    if settings.is_embedding and info.causal:
        return Serves(TASK, "alone")
    if headless or not info.causal or (Path(info.path) / "modules.json").is_file():
        return Serves(TASK, "default")
    reason = f"{NOT_EMBEDDING_MODEL} (`--task generation,embedding` serves both.)"
    return Serves(TASK, "on_request", reason, common_reason=NOT_EMBEDDING_MODEL)


def read_recipe(info: ModelInfo, settings: EmbeddingSettings) -> Recipe:
    """The recipe of the checkpoint in ``info.path``.

    ModelError, with the reason, when its modules.json contains something that isn't supported.
    """
    folder = Path(info.path)
    matryoshka = _matryoshka(folder, info, settings)
    if not (folder / "modules.json").is_file():
        return Recipe(
            modes=(_default_mode(info) if settings.pooling == "auto" else settings.pooling,),
            normalize=True,
            dimensions=info.hidden_size,
            max_length=_tokenizer_limit(folder),
            matryoshka=matryoshka,
        )
    _, pooling, *rest = _pipeline(folder)
    modes = _modes(pooling, info)
    own = _transformer_config(folder)
    modules = _modules(rest, info.hidden_size * len(modes))
    ends_normal = bool(modules) and modules[-1].kind == "Normalize"
    if ends_normal:
        modules = modules[:-1]
    about = _read(folder / "config_sentence_transformers.json")
    prompts = {str(name): text for name, text in (about.get("prompts") or {}).items() if isinstance(text, str)}
    default = about.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ModelError(f"{folder}: default_prompt_name {default!r} is none of its prompts ({_listed(prompts)}).")
    return Recipe(
        modes=modes,
        normalize=ends_normal,
        dimensions=modules[-1].width if modules else info.hidden_size * len(modes),
        modules=modules,
        include_prompt=pooling[1].get("include_prompt", True) is not False,
        max_length=_number(own.get("max_seq_length")) or _tokenizer_limit(folder),
        lower_case=own.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default,
        matryoshka=matryoshka,
        similarity=str(about.get("similarity_fn_name") or "cosine"),
    )


def _default_mode(info: ModelInfo) -> str:
    """Last token for decoders, also for those that were made bidirectional; else the first token."""
    two_way = info.config.get("is_causal") is False or info.config.get("use_bidirectional_attention") is True
    return "lasttoken" if info.causal or two_way else "cls"


# -- modules.json ----------------------------------------------------------------------------


def _pipeline(folder: Path) -> list[tuple[Path, dict[str, Any], str]]:
    """Each module's folder, config and class name; a Transformer and a Pooling come first."""
    listed = _read(folder / "modules.json", list)
    found = []
    for entry in listed:
        dotted, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dotted, str) or not isinstance(path, str):
            raise ModelError(f"{folder / 'modules.json'} must list objects with a type and a path.")
        own = (folder / path).resolve()
        if not own.is_relative_to(folder.resolve()):
            raise ModelError(f"{folder / 'modules.json'}: the path {path!r} leads out of the folder.")
        if not dotted.startswith("sentence_transformers."):
            raise ModelError(f"{folder / 'modules.json'} asks for {dotted}, code of its own, which is never run.")
        kind = dotted.rpartition(".")[2]
        if kind != "Dropout":  # which has an effect in training only
            found.append((own, _read(own / "config.json") if path else {}, kind))
    kinds = [kind for _, _, kind in found]
    if kinds[:2] != ["Transformer", "Pooling"] or found[0][0] != folder.resolve():
        raise ModelError(
            f"{folder / 'modules.json'} is a chain of {', '.join(kinds) or 'nothing'}; served are chains that begin "
            "with a Transformer, in the folder itself, and Pooling."
        )
    return found


def _modes(pooling: tuple[Path, dict[str, Any], str], info: ModelInfo) -> tuple[str, ...]:
    folder, config, _ = pooling
    given = config.get("pooling_mode")
    if given is None:
        modes = tuple(mode for key, mode in LEGACY_MODES.items() if config.get(key)) or ("mean",)
    else:
        modes = (given,) if isinstance(given, str) else tuple(given)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ModelError(f"{folder / 'config.json'} asks for pooling {unknown[0]!r}; there are {_listed(MODES)}.")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", info.hidden_size))
    if width != info.hidden_size:
        raise ModelError(f"{folder / 'config.json'} pools rows of {width} numbers, the model gives {info.hidden_size}.")
    return modes


def _modules(found: list[tuple[Path, dict[str, Any], str]], width: int) -> tuple[Module, ...]:
    """The modules after pooling, whose input vectors have the length ``width``."""
    modules = []
    for folder, config, kind in found:
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                raise ModelError(
                    f"{folder / 'config.json'}: {key} {config[key]!r} isn't served, only the embedding is."
                )
        if kind == "Dense":
            _check_dense(folder, config, width)
            width = int(config["out_features"])
        elif kind not in ("LayerNorm", "Normalize"):
            raise ModelError(f"{folder} is a {kind} module; after Pooling, Dense, LayerNorm and Normalize are served.")
        if kind != "Normalize":
            _check_weights(folder)
        modules.append(Module(kind, str(folder), width, config))
    return tuple(modules)


def _check_dense(folder: Path, config: dict[str, Any], width: int) -> None:
    if config.get("in_features") != width or _number(config.get("out_features")) is None:
        raise ModelError(f"{folder / 'config.json'}: in_features must be {width} and out_features a number above 0.")
    activation = config.get("activation_function")
    if activation is not None and activation_name(config) not in ACTIVATIONS:
        raise ModelError(f"{folder / 'config.json'}: activation {activation!r} isn't one of {_listed(ACTIVATIONS)}.")


def activation_name(config: dict[str, Any]) -> str:
    """The class name of a Dense module's activation in torch.nn; "" for a class of another module."""
    dotted = str(config.get("activation_function", "torch.nn.Tanh"))
    return dotted.rpartition(".")[2] if dotted.startswith("torch.nn.") else ""


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    if (folder / "pytorch_model.bin").is_file():
        raise ModelError(
            f"{folder} stores its weights as pytorch_model.bin, a pickle, which is never opened. "
            "Load the model with sentence-transformers and save it again: it writes model.safetensors."
        )
    raise ModelError(f"{folder} has no model.safetensors.")


def _transformer_config(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json or one of its older names; {} when there is none."""
    own: dict[str, Any] = next((config for name in TRANSFORMER_CONFIGS if (config := _read(folder / name))), {})
    kinds = own.get("modality_config", {"text": {}})
    if "message" in kinds:
        raise ModelError(
            f"{folder}: its sentence_bert_config.json sends texts through the chat template (message in "
            "modality_config), which isn't served; remove message there if texts were embedded as they stand."
        )
    texts = kinds.get("text")
    if (
        own.get("transformer_task", "feature-extraction") != "feature-extraction"
        or texts is None
        or texts.get("method", "forward") != "forward"
        or texts.get("method_output_name", "last_hidden_state") != "last_hidden_state"
    ):
        raise ModelError(f"{folder}: its sentence_bert_config.json takes something else than texts' last hidden state.")
    return own


# -- limits ----------------------------------------------------------------------------------


def _tokenizer_limit(folder: Path) -> int | None:
    limit = _number(_read(folder / "tokenizer_config.json").get("model_max_length"))
    return limit if limit is not None and limit < 1 << 31 else None  # transformers writes 10**30 for no limit


def _matryoshka(folder: Path, info: ModelInfo, settings: EmbeddingSettings) -> tuple[int, ...] | None:
    for config in (_read(folder / "config_sentence_transformers.json"), info.config):
        lengths = config.get("matryoshka_dimensions")
        if isinstance(lengths, list) and lengths and all(_number(length) for length in lengths):
            return tuple(sorted(lengths))
        if config.get("is_matryoshka") is True or _number(config.get("truncate_dim")) is not None:
            return ()
    return () if settings.matryoshka else None


def _number(value: Any) -> int | None:
    """The value as an int if it is a number of at least 1, else None."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 else None


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def _read(path: Path, kind: type = dict) -> Any:
    """A JSON file of that kind, empty when there is none. ModelError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.") from error
    if not isinstance(value, kind):
        raise ModelError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}.")
    return value
