"""Core's own plugin: from a model reference to a model that runs forward passes; knows no scheduler and no HTTP.

Imported by ``trunkline --help``: nothing heavy at the top.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.core.errors import ModelError
from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import ModelSource, SettingsGroup

from .sources import DEMO
from .transforms.settings import GROUP, QuantizationSettings

if TYPE_CHECKING:
    from trunkline.core.types import Head, ModelInfo, Settings, Tokenizer, Transform

    from .sources.tensor_file import StoredTensor


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(GROUP, QuantizationSettings, per_model=True)


@hookimpl(trylast=True)
def trunkline_resolve_model(reference: str) -> ModelSource | None:
    """A local folder, ``demo:NAME``, or a hub id, ``owner/name`` or ``owner/name@revision``."""
    if reference.startswith(DEMO):
        from trunkline.core.model.sources import catalogue

        return ModelSource(reference, str(catalogue.fetch(reference)))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return ModelSource(reference, str(folder.resolve()))
    if folder.suffix == ".gguf" and folder.is_file():
        from trunkline.core.model.sources.gguf.folder import folder_of

        return ModelSource(reference, str(folder_of(folder)))
    if folder.exists():
        raise ModelError(
            f"{reference} is a file; give the folder that holds config.json and the weights, or a GGUF file."
        )
    return ModelSource(reference, _from_hub(reference))


@hookimpl(trylast=True)
def trunkline_tokenizer(source: ModelSource) -> Tokenizer | None:
    from trunkline.core.model.sources import tokenizer

    return tokenizer.load(source)


@hookimpl(trylast=True)
def trunkline_weights(source: ModelSource) -> Iterable[tuple[str, StoredTensor]] | None:
    from trunkline.core.model.sources import weights
    from trunkline.core.model.sources.gguf import tensors as gguf
    from trunkline.core.model.sources.quantized import tensors as quantized

    if gguf.is_prepared(source.path):
        return gguf.stream(source.path)
    weights.files(source.path)  # so that a folder without weights is refused here, not in mid-stream
    if (form := quantized.format_of(source.path)) is not None:
        return quantized.stream(source.path, form)
    return weights.stream(source.path)


@hookimpl
def trunkline_heads(model: ModelInfo, settings: Settings) -> Iterable[Head]:
    """The heads "lm" and "score" of the checkpoints that have them, for whichever task wants them."""
    from . import lm_head, scores

    if model.score_rows:
        return [scores.head(model)]
    return [lm_head.HEAD] if model.causal and model.architecture.endswith(lm_head.CLASSES) else []


@hookimpl(trylast=True)
def trunkline_transforms(model: ModelInfo, settings: Settings) -> Iterable[Transform]:
    from .sources.gguf import tensors as gguf
    from .sources.quantized import tensors as quantized
    from .transforms import quantization, stored

    if (name := settings[GROUP].quantization) is not None:
        return [quantization.transform(name)]
    if gguf.is_prepared(model.path):
        return [stored.transform("gguf", gguf.stream(model.path))]
    if (form := quantized.format_of(model.path)) is not None:
        return [stored.transform(form.name, quantized.stream(model.path, form))]
    return []


def _from_hub(reference: str) -> str:
    """Download a hub repository, or find it in the hub's cache, and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = reference.partition("@")
    try:
        return snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.codes", "*.jinja"],
        )
    except HFValidationError as error:
        raise ModelError(f"{reference!r} is neither a folder nor a hub id nor one of the {DEMO} models.") from error
    except Exception as error:  # network, missing repository, no permission: the hub's own sentence says which
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{reference!r} is not a local folder and can't be downloaded from the hub: {reason} "
            f"Give a folder, or {DEMO}smollm2-135m-instruct, which comes from PyPI."
        ) from error
