"""The backend: which kernel computes each operation. The engine chooses it at start-up, the model calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch

from . import (
    activation,
    adjust,
    attention_decode,
    attention_extend,
    expert_counts,
    glu,
    grouped_linear,
    kv_write,
    layer_norm,
    linear,
    logprobs,
    norm,
    pool,
    rope,
    sample,
)
from .cpu.processor import has_bfloat16
from .deterministic import torch_calls
from .deterministic.linear import OrderedLinear, ordered_experts
from .grouped_linear import GroupedLinear
from .layout import Layout

logger = logging.getLogger(__name__)

WIDEST_HEAD = 256  # for Triton kernels

Operation = Callable[..., torch.Tensor]
F = TypeVar("F", bound=Callable[..., Any])


def _unchanged(function: F) -> F:
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """All operations on a device, one field per operation; ``--attention-backend`` chooses it.

    Nothing outside of this package calls a device's kernel by name: models, stages and plugins call these fields.
    The module of each operation documents its arguments and results, at the function ``*_reference`` (plain torch, for
    every device); all backends take the same. A backend may support fewer dtypes, which its own function documents.

    ``captures``: whether decode-only passes can be CUDA graphs: ``decode``, ``write`` and ``rope`` read all that
    differs between passes from tensors, and don't take longer for a wider slot table. ``int8_cache``: whether
    attention, ``write`` and ``rope`` take an int8 KV pool (:mod:`.quantized.cache`). ``scratch_bytes``: an estimate of
    the memory that attention takes beside its arguments, in bytes. ``row_invariant``: wraps a function that calls
    torch's operations, so that its result for a row has the same bits in any batch where this backend promises that
    (:data:`CPU_DETERMINISTIC`); others return the function as it is. ``pack_experts``: makes a layer in place of
    ``grouped_linear`` of a weight; None if there is none. ``packs_modules``: whether ``linear`` replaces any nn.Linear.

    Decoding rows go to ``decode``. All prompt rows go to ``extend``, even a prompt whose only uncached token
    is its last one: the two kernels add in different orders, and a prompt's result must not depend on how
    much of it was cached.
    """

    name: str
    # Attention, called by :meth:`attention`: :mod:`.attention_decode`, :mod:`.attention_extend`, :mod:`.kv_write`.
    decode: Callable[..., None]
    extend: Callable[..., None]
    write: Callable[..., None]
    # Layers: :mod:`.norm`, :mod:`.layer_norm`, :mod:`.rope` (in place), :mod:`.glu`, :mod:`.activation`,
    # :mod:`.linear` (makes a layer of a weight, once). Experts: :mod:`.expert_counts`, :mod:`.grouped_linear`.
    rms_norm: Operation
    layer_norm: Operation
    rope: Callable[..., None]
    glu: Operation
    activate: Operation
    linear: Callable[..., linear.LinearLayer]
    expert_counts: Operation
    grouped_linear: Operation
    # Results: :mod:`.pool`, :mod:`.sample`, :mod:`.adjust` (both operations in place), :mod:`.logprobs`.
    pool: Operation
    sample: Operation
    adjust: Callable[..., None]
    mask_tokens: Callable[..., None]
    logprobs: Callable[..., logprobs.RowLogprobs]
    captures: bool = False
    int8_cache: bool = False
    scratch_bytes: int = 0
    row_invariant: Callable[[F], F] = _unchanged
    pack_experts: Callable[[torch.Tensor], GroupedLinear] | None = None
    packs_modules: bool = False

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        layout: Layout,
        *,
        scale: float,
        causal: bool = True,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        chunk: int = 0,
        out: torch.Tensor | None = None,
        written: bool = False,
    ) -> torch.Tensor:
        """One layer's attention over packed rows; writes the new keys and values to the pool first.

        ``written``: not so, because this backend's ``rope`` has written them; ``k`` and ``v`` are as it left them.
        Only for causal layers with a pool.

        ``q`` [T, H, D], ``k`` [T, KV, D], ``v`` [T, KV, Dv] -> [T, H, Dv], contiguous and of ``q``'s dtype;
        written to ``out`` if given. ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv] are this
        layer's part of the KV pool, or None; without a pool, and when not causal, no row has a cached
        prefix. With an int8 pool, causal layers read keys and values of new tokens from it, too. The mask
        and the scores:

        * ``scale`` multiplies ``q kᵀ``. ``softcap`` c > 0 replaces a score s by ``c * tanh(s / c)`` (Gemma 2).
        * ``window`` w > 0, in tokens: a query at position p sees keys at ``p - w < j <= p``; when not
          causal, at ``|p - j| < w``.
        * ``chunk`` c > 0, in tokens: a query sees only keys of its own chunk, ``j // c == p // c`` (Llama 4).
        * ``sinks`` [H]: one score per head, which takes part in the softmax but has no value (GPT-OSS).

        0 means none for these three numbers. The cpu backend raises ValueError for prompt rows in
        dtypes other than float32 and bfloat16.
        """
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "chunk": chunk}
        if keys is not None and values is not None and not written:
            self.write(k, v, keys, values, layout.out_slots)
        if keys is None or values is None or not causal:
            self.extend(q, k, v, None, None, layout, range(layout.rows), out, causal=causal, **options)
            return out
        if layout.split is None:
            layout.split = self._split(layout)
        decoding, prompts = layout.split
        if len(decoding):
            self.decode(q, keys, values, layout, decoding, out, **options)
        if len(prompts):
            self.extend(q, k, v, keys, values, layout, prompts, out, causal=True, **options)
        return out

    @staticmethod
    def _split(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """The row numbers for ``decode`` and those for ``extend``, int32 each."""
        rows = np.arange(layout.rows, dtype=np.int32)
        return rows[: layout.decodes], rows[layout.decodes :]


CPU = Backend(
    name="cpu",
    decode=attention_decode.decode_cpu,
    extend=attention_extend.extend_cpu,
    write=kv_write.write_cpu,
    rms_norm=norm.rms_norm_cpu,
    layer_norm=layer_norm.layer_norm_cpu,
    rope=rope.rope_cpu,
    glu=glu.glu_cpu,
    activate=activation.activate_cpu,
    linear=linear.PackedLinear,
    expert_counts=expert_counts.expert_counts_reference,
    grouped_linear=grouped_linear.grouped_linear_cpu,
    pool=pool.pool_cpu,
    sample=sample.sample_cpu,
    adjust=adjust.adjust_cpu,
    mask_tokens=adjust.mask_tokens_cpu,
    logprobs=logprobs.logprobs_cpu,
    int8_cache=True,
    pack_experts=grouped_linear.packed_experts,
)
CPU_DETERMINISTIC = replace(
    CPU,
    decode=attention_decode.decode_ordered,
    linear=OrderedLinear,
    pack_experts=ordered_experts,
    packs_modules=True,
    row_invariant=torch_calls.row_invariant,
)
TORCH_NATIVE = Backend(
    name="torch_native",
    decode=attention_decode.decode_batched,
    extend=attention_extend.extend_reference,
    write=kv_write.write_reference,
    rms_norm=norm.rms_norm_reference,
    layer_norm=layer_norm.layer_norm_reference,
    rope=rope.rope_reference,
    glu=glu.glu_reference,
    activate=activation.activate_reference,
    linear=linear.PlainLinear,
    expert_counts=expert_counts.expert_counts_reference,
    grouped_linear=grouped_linear.grouped_linear_reference,
    pool=pool.pool_reference,
    sample=sample.sample_reference,
    adjust=adjust.adjust_reference,
    mask_tokens=adjust.mask_tokens_reference,
    logprobs=logprobs.logprobs_reference,
    # Scores, masked scores and weights; or keys and values, of which there are copies while they are converted.
    scratch_bytes=3 * max(attention_extend.SCORE_BYTES, attention_decode.GATHERED_BYTES),
)


@cache
def _triton() -> Backend:
    """The Triton backend; products of matrices are torch's. Only here, ``triton`` is imported."""
    from trunkline.kernels.triton import activation as triton_activation
    from trunkline.kernels.triton import adjust as triton_adjust
    from trunkline.kernels.triton import attention_decode as triton_decode
    from trunkline.kernels.triton import attention_extend as triton_extend
    from trunkline.kernels.triton import cost, launch
    from trunkline.kernels.triton import expert_counts as triton_counts
    from trunkline.kernels.triton import glu as triton_glu
    from trunkline.kernels.triton import kv_write as triton_write
    from trunkline.kernels.triton import layer_norm as triton_layer_norm
    from trunkline.kernels.triton import logprobs as triton_logprobs
    from trunkline.kernels.triton import norm as triton_norm
    from trunkline.kernels.triton import pool as triton_pool
    from trunkline.kernels.triton import rope as triton_rope
    from trunkline.kernels.triton import sample as triton_sample

    launch.prepare_compiler()
    return replace(
        TORCH_NATIVE,
        name="triton",
        decode=triton_decode.decode,
        extend=triton_extend.extend,
        write=triton_write.write,
        rms_norm=triton_norm.rms_norm,
        layer_norm=triton_layer_norm.layer_norm,
        rope=triton_rope.rope,
        glu=triton_glu.glu,
        activate=triton_activation.activate,
        expert_counts=triton_counts.expert_counts,
        pool=triton_pool.pool,
        sample=triton_sample.sample,
        adjust=triton_adjust.adjust,
        mask_tokens=triton_adjust.mask_tokens,
        logprobs=triton_logprobs.logprobs,
        captures=True,
        scratch_bytes=cost.SCRATCH_BYTES,
    )


def _runs_triton(device: str) -> bool:
    """Whether Triton kernels can run: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    if find_spec("triton") is None:
        return False
    if device != "cpu":
        return True
    from trunkline.kernels.triton.launch import interpreted

    return interpreted()


def choose(name: str | None, device: str, widest_head: int = 0, *, deterministic: bool = False) -> Backend:
    """The backend ``name`` for the device type "cpu" or "cuda"; None or "auto" is the device's default.

    ``widest_head``: of all keys and values of the model, in numbers. ``deterministic``: results for a row have the same
    bits in any batch; only the backend "cpu" has that.

    The default is "cpu" on a CPU; elsewhere, it is "triton", or "torch_native" if ``triton`` isn't installed. It also
    replaces a backend that the device can't run, and Triton if heads are too wide for it, with a warning.
    ``Backend.name`` is the one that was chosen.
    ValueError for an unknown name, and for a backend or device that can't be deterministic.
    """
    default = "cpu" if device == "cpu" else "triton" if _runs_triton(device) else "torch_native"
    name = default if name in (None, "auto") else name
    if name not in ("cpu", "torch_native", "triton"):
        raise ValueError(f"unknown attention backend {name!r}: choose auto, cpu, torch_native or triton")
    if deterministic:
        if name != "cpu" or device != "cpu":
            raise ValueError(
                f"the attention backend {name!r} on the device {device!r} has no deterministic mode; "
                "only 'cpu' on a CPU has one"
            )
        return CPU_DETERMINISTIC
    if (name == "triton" and not _runs_triton(device)) or (name == "cpu" and device != "cpu"):
        logger.warning("attention backend %r doesn't run on device %r; using %r", name, device, default)
        name = default
    if name == "triton":
        if widest_head > WIDEST_HEAD:
            logger.warning("heads of %d numbers are too wide for Triton kernels; using 'torch_native'", widest_head)
            return TORCH_NATIVE
        return _triton()
    return CPU if name == "cpu" else TORCH_NATIVE


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device of type "cpu" or "cuda" has instructions for products of bfloat16 matrices."""
    return device != "cpu" or has_bfloat16()
