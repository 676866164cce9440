"""Plans a model's memory without its weights, then loads it and checks its fast paths."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError
from trunkline.core.model.sources import weights as safetensors
from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.core.types import Head, ModelInfo, ModelSource, Tokenizer

from .architecture import (
    adapt,
    backbone_of,
    base_class,
    choose_dtype,
    layer_count,
    options,
    position_offset,
    position_table,
    resolve,
)
from .attention import NAME, ForwardContext, packed_layout
from .expert_watch import watch_experts
from .experts import bind_backend
from .float32 import float32_view
from .head_proof import verify_heads, wrong_heads
from .loaded import LoadedModel
from .packed import PackedModel
from .proof import shapes_of, verify_attention
from .refusal import BYPASSED, explained, failed_pass, reason_of

if TYPE_CHECKING:
    from trunkline.core.settings import ModelSettings
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")

Tensors = dict[str, torch.Tensor | StoredTensor]
CPU = torch.device("cpu")
DRY_RUN = 4  # tokens of the pass that determines shapes
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # allowed dtypes of stored parameters


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The memory demand of a model. ``active_parameters``: number of parameters that are used for one token."""

    weight_bytes: int
    kv_shapes: list[KVShape]
    kv_bytes_per_token: int
    dtype: torch.dtype
    active_parameters: int
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the class's parameters


@explained
def plan(source: ModelSource, info: ModelInfo, settings: ModelSettings, device: torch.device = CPU) -> ModelPlan:
    """Sizes of weights and of one token's keys and values, without loading weights.

    They come from a pass on the meta device. If that fails (because the forward reads values of tensors), they are
    estimated from the config. ModelError when the model can't be served.
    """
    cls, config = resolve(info)
    dtype = choose_dtype(settings.dtype, device)
    with quiet(), torch.device("meta"):
        try:
            whole = cls._from_config(config, dtype=dtype, **options(cls, info))
        except Exception as error:  # model classes raise various exceptions
            if error.args == (NAME,):  # KeyError of a class with its own table of attention functions
                raise ModelError(f"{info.architecture} can't be served: {BYPASSED}") from error
            raise ModelError(f"{source.reference} can't be built from its config: {reason_of(error)}") from error
    adapt(whole)
    shapes = _dry_run(whole, info) if info.causal else []
    return ModelPlan(
        weight_bytes=sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers())),
        kv_shapes=shapes,
        kv_bytes_per_token=KVPool.bytes_per_token(shapes, dtype),
        dtype=dtype,
        active_parameters=_active_parameters(whole, config),
        shapes={name: parameter.shape for name, parameter in whole.named_parameters()},
    )


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
    device: torch.device = CPU,
) -> LoadedModel:
    """Load a model, verify it, and fuse its layers. ``weights``: stream of tensors, by default of its safetensors
    files.

    ``name`` (by default the reference), ``tokenizer`` and ``max_request_tokens`` (by default the context length) are
    attributes of the result for stages.

    ModelError when weights are missing or don't fit, or when the model can't be served; a head
    that can't be proven, or whose weights alone are missing, only ends up in ``refused``.
    """
    cls, config = resolve(info)
    dtype = choose_dtype(settings.dtype, device)
    tensors = dict(safetensors.stream(source.path) if weights is None else weights)
    whole, lacking, unused = _fill(cls, config, dtype, tensors, info, source.reference)
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
    return LoadedModel(
        **vars(model),
        name=name,
        tokenizer=tokenizer,
        max_request_tokens=max_request_tokens or info.context_length,
        kv_shapes=kv_shapes,
        heads=verified,
        refused=refused,
        fused=fused,
        expert_watch=watch_experts(model),
        unused=unused,
        stored={name: one for name, one in tensors.items() if isinstance(one, StoredTensor)},
    )


def _fuse(model: PackedModel) -> str:
    """Fuse layers, in place; returns a sentence about the result."""
    if model.padded:
        return "padded batches, because its attention can't be replaced"
    from trunkline.core.model.fusion.find_decoder import fuse

    return fuse(model.whole, model.backend).sentence


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


def _fill(
    cls: Any, config: Any, dtype: torch.dtype, tensors: Tensors, info: ModelInfo, reference: str
) -> tuple[Any, str, frozenset[str]]:
    """An instance of ``cls`` with the checkpoint's tensors, a sentence about missing tensors, "" if none is missing,
    and the names of unused tensors.

    If only tensors of the head are missing, it is an instance of the class without head: many
    checkpoints of base models name a class with head.
    """
    mapped = {one.untyped_storage().data_ptr() for one in tensors.values() if isinstance(one, torch.Tensor)}
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
        whole, missing, unused = _instance(base, config, dtype, tensors, info, reference)
        if missing:
            raise ModelError(lacking)
    for parameter in whole.parameters():
        # A parameter in a memory-mapped file would change when the file does, or crash the process.
        if parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()
    adapt(whole)
    return whole.requires_grad_(False).eval(), lacking, unused


def _instance(
    cls: Any, config: Any, dtype: torch.dtype, tensors: Tensors, info: ModelInfo, reference: str
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


class _DryRun:
    """A backend for the meta device, on which tensors have shapes but no values."""

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _dry_run(whole: Any, info: ModelInfo) -> list[KVShape]:
    """Each layer's key and value shapes, from one pass of a causal model on the meta device."""
    context = ForwardContext(packed_layout([DRY_RUN]), None, cast("Backend", _DryRun()))
    ids = torch.zeros(1, DRY_RUN, dtype=torch.int64, device="meta")
    layers = layer_count(whole.config)
    try:
        with torch.inference_mode(), quiet():
            backbone_of(whole)(input_ids=ids, position_ids=ids, past_key_values=None, use_cache=False, trunk=context)
    except Exception as error:  # the forward reads values of tensors; exact shapes are known after loading
        log.info("%s: no dry run (%s), sizes are the config's", info.architecture, error)
        try:
            return [_shape_in_config(whole.config.get_text_config())] * layers
        except Exception:  # the config doesn't have these sizes
            raise ModelError(f"{info.architecture} can't be served: {failed_pass(error)}") from error
    return shapes_of(context, layers, info.architecture)


def _shape_in_config(config: Any) -> KVShape:
    """Upper bound on the shapes of a layer's keys and values: if the plan is too small, memory runs out later."""
    heads = int(config.num_attention_heads)
    widths = [config.hidden_size // heads]
    widths += [getattr(config, name, None) or 0 for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    return heads, int(max(widths)), int(max(widths))


def _active_parameters(whole: Any, config: Any) -> int:
    """Number of parameters without embeddings; experts count in proportion to the share that a token uses."""
    text = config.get_text_config()
    table = getattr(whole.get_input_embeddings(), "weight", None)  # some classes have several tables
    total = 0.0
    for name, parameter in whole.named_parameters():
        if parameter is table:
            continue
        share = 1.0
        if parameter.ndim == 3 and ".experts." in name:
            share = min(1.0, (getattr(text, "num_experts_per_tok", None) or 1) / parameter.shape[0])
        total += parameter.numel() * share
    return math.ceil(total)
