"""Loads a model onto a device, verifies it, and fuses its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.memory import give_memory_back
from trunkline.core.model.sources import weights as safetensors
from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.core.types import Head, ModelInfo, ModelSource, Tokenizer, Transform

from .architecture import (
    adapt,
    backbone_of,
    base_class,
    choose_dtype,
    choose_kv_dtype,
    options,
    position_offset,
    position_table,
    resolve,
)
from .expert_watch import watch_experts
from .experts import bind_backend
from .float32 import float32_view
from .loaded import LoadedModel
from .packed import PackedModel
from .refusal import explained
from .transforms.apply import apply_transforms
from .verification.attention import verify_attention, verify_cache
from .verification.heads import verify_heads, wrong_heads
from .verification.rows import verify_rows

if TYPE_CHECKING:
    from trunkline.core.discovery import Provided
    from trunkline.core.settings import ModelSettings
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")

CPU = torch.device("cpu")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # allowed dtypes of stored parameters


@explained
def load(
    source: ModelSource,
    info: ModelInfo,
    settings: ModelSettings,
    heads: Iterable[Head],
    backend: Backend,
    *,
    name: str = "",
    tokenizer: Tokenizer | None = None,
    max_request_tokens: int = 0,
    weights: Iterable[tuple[str, torch.Tensor | StoredTensor]] | None = None,
    transforms: Sequence[Provided[Transform]] = (),
    device: torch.device = CPU,
) -> LoadedModel:
    """Load a model onto ``device``, verify it, and fuse its layers. ``weights``: stream of tensors, by default of its
    safetensors files; each of them goes to the device when it is read. ``transforms``: how they are stored after that.

    ``name`` (by default the reference), ``tokenizer`` and ``max_request_tokens`` (by default the context length) are
    attributes of the result for stages.

    ModelError when weights are missing or don't fit, or when the model can't be served; a head
    that can't be proven, or whose weights alone are missing, only ends up in ``refused``.
    """
    cls, config = resolve(info)
    dtype = choose_dtype(settings.dtype, device)
    kv_dtype = choose_kv_dtype(settings.kv_cache_dtype, dtype)
    stream = safetensors.stream(source.path) if weights is None else weights
    tensors = {name: one if isinstance(one, StoredTensor) else one.to(device) for name, one in stream}
    placed = {name: PlacedTensor(tensor, device) for name, tensor in tensors.items()}
    whole, lacking, unused = fill(cls, config, dtype, placed, info, source.reference)
    _check_positions(whole, info)
    bind_backend(whole, backend)
    heads, name = list(heads), name or source.reference
    model = PackedModel.of(whole.to(device), info, backend, device, dtype)
    with quiet():
        model, kv_shapes = verify_attention(model)
        wrong = wrong_heads(model, heads)
    fused = _fuse(model)
    view = float32_view(whole, tensors, backend)
    verified, refused = verify_heads(model, heads, view, wrong)
    for head, reason in refused.items():
        refused[head] = f"{reason} {lacking}".strip()
        log.warning("%s: %s", name, refused[head])
    stored_as = apply_transforms(model, transforms, tensors)
    if stored_as:
        give_memory_back()  # that of the numbers that were packed
    if kv_shapes and kv_dtype != dtype:
        verify_cache(model, kv_shapes, kv_dtype)
    if settings.enable_deterministic_inference:
        verify_rows(model, kv_shapes, kv_dtype)
    return LoadedModel(
        **vars(model),
        name=name,
        tokenizer=tokenizer,
        max_request_tokens=max_request_tokens or info.context_length,
        kv_shapes=kv_shapes,
        kv_dtype=kv_dtype,
        heads={name: backend.row_invariant(apply) for name, apply in verified.items()},
        refused=refused,
        fused=fused,
        stored_as=stored_as,
        expert_watch=watch_experts(model),
        unused=unused,
        stored={name: one for name, one in tensors.items() if isinstance(one, StoredTensor)},
    )


def _fuse(model: PackedModel) -> str:
    """Fuse layers, in place; returns a sentence about the result."""
    from trunkline.core.model.fusion.find_decoder import fuse
    from trunkline.core.model.fusion.pack import pack_weights

    backbone, report = model.backbone, None if model.padded else fuse(model.whole, model.backend)
    pack_weights(backbone, model.backend)
    if report is None or not report.fused_forward:
        backbone.forward = model.backend.row_invariant(backbone.forward)
    return "padded batches, because its attention can't be replaced" if report is None else report.sentence


@contextmanager
def quiet() -> Iterator[None]:
    """Disable transformers' progress bars and warnings; problems are raised or logged by us."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


class PlacedTensor:
    """A checkpoint's tensor that is read to one device, whatever device transformers asks for.

    transformers moves tensors to other devices than the CPU only with the package accelerate. Each of its threads
    reads one tensor at a time, so that the host has only that many of them if the model is on another device.
    """

    def __init__(self, tensor: torch.Tensor | StoredTensor, device: torch.device) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._tensor, self._device = tensor, device

    def __getitem__(self, index: EllipsisType) -> PlacedTensor:
        """The whole tensor (the index is ``...``); nothing is read."""
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor on its device."""
        return self._tensor.to(self._device, dtype or self.dtype)

    @property
    def memory(self) -> int | None:
        """The address of the host memory that ``to`` may share; None if there is none."""
        if isinstance(self._tensor, torch.Tensor) and self._device.type == "cpu":
            return self._tensor.untyped_storage().data_ptr()
        return None


def fill(
    cls: Any, config: Any, dtype: torch.dtype, tensors: Mapping[str, PlacedTensor], info: ModelInfo, reference: str
) -> tuple[Any, str, frozenset[str]]:
    """An instance of ``cls`` with the checkpoint's tensors, a sentence about missing tensors, "" if none is missing,
    and the names of unused tensors.

    Parameters are on the device of ``tensors``, buffers that aren't in the checkpoint on the CPU.

    If only tensors of the head are missing, it is an instance of the class without head: many
    checkpoints of base models name a class with head.
    """
    mapped = {one.memory for one in tensors.values()} - {None}
    whole, missing, unused = _instance(cls, config, dtype, tensors, info, reference)
    lacking = ""
    if missing:
        lacking = (
            f"{reference} lacks {len(missing)} of the tensors that {cls.__name__} needs, the first is {missing[0]}; "
            "the checkpoint is incomplete or of another class than its config.json says."
        )
        base = base_class(config, cls)
        if base in (None, cls) or any(name.startswith(f"{cls.base_model_prefix}.") for name in missing):
            raise ModelError(lacking)
        del whole  # or the device would have both instances at the same time
        whole, missing, unused = _instance(base, config, dtype, tensors, info, reference)
        if missing:
            raise ModelError(lacking)
    for parameter in whole.parameters():
        # A parameter in a memory-mapped file would change when the file does, or crash the process.
        if mapped and parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()
    adapt(whole)
    return whole.requires_grad_(False).eval(), lacking, unused


def _instance(
    cls: Any, config: Any, dtype: torch.dtype, tensors: Mapping[str, PlacedTensor], info: ModelInfo, reference: str
) -> tuple[Any, list[str], frozenset[str]]:
    """An instance of ``cls``, the names of missing tensors, and those of unused ones.

    ModelError where shapes or number formats don't fit.
    """
    with quiet():
        try:
            whole, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **options(cls, info),
            )
        except Exception as error:  # wrong shapes, damaged files, checks of the class
            raise ModelError(f"{reference} can't be loaded: {error}") from error
    if mismatched := sorted(report["mismatched_keys"]):
        name, given, expected = mismatched[0]
        raise ModelError(
            f"{reference} can't be loaded: Attempted to load weight ({torch.Size(given)}) "
            f"into parameter ({torch.Size(expected)}): {name}."
        )
    for name, parameter in whole.named_parameters():
        stored = tensors.get(name)
        if stored is not None and parameter.is_floating_point() and stored.dtype not in FLOATS:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(
                f"{reference} can't be loaded: {name} is stored as {kind}; "
                "use the float16, bfloat16 or float32 checkpoint."
            )
    if unexpected := sorted(report["unexpected_keys"]):
        log.info("%s: %d tensors are not used, the first is %s", reference, len(unexpected), unexpected[0])
    return whole, sorted(report["missing_keys"]), frozenset(unexpected)


def _check_positions(whole: Any, info: ModelInfo) -> None:
    """ModelError when the position table is shorter than the context length."""
    backbone = backbone_of(whole)
    table = position_table(backbone)
    if table is not None and table.num_embeddings - position_offset(backbone) < info.context_length:
        room = table.num_embeddings - position_offset(backbone)
        raise ModelError(f"{info.architecture} has embeddings of {room} positions only; give --context-length {room}.")
