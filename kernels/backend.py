"""Which kernels run, chosen once when the engine starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from . import attention_decode, attention_extend, kv_write, logprobs, sample
from .layout import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """One operation a field; shapes and meanings stand in the file of each operation.

    Decoding rows go to ``decode``, and all rows of prompts to ``extend``, also those with one query left over a
    cached prefix: the two sum in different orders, and a prompt's result must not depend on what was cached.
    """

    name: str
    decode: Callable[..., None]
    extend: Callable[..., None]
    write: Callable[..., None]
    sample: Callable[..., torch.Tensor]
    logprobs: Callable[..., logprobs.RowLogprobs]

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
    ) -> torch.Tensor:
        """One layer's attention over packed rows; first puts the new keys and values into the pool.

        ``q`` [T, H, D], ``k`` [T, KV, D], ``v`` [T, KV, Dv] -> [T, H, Dv], contiguous; into ``out`` if given.
        ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv]: this layer's pool, or None (every
        row is whole then). A query sees keys at distance ``0 <= d < window`` (``|d| < window``
        when not causal; window 0 = any), in its own ``chunk`` of positions (0 = any);
        ``softcap`` 0 = none; ``sinks`` [H] joins the softmax as one more column without value.
        """
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "chunk": chunk}
        if keys is None or values is None or not causal:
            if keys is not None and values is not None:
                self.write(k, v, keys, values, layout.out_slots)
            self.extend(q, k, v, None, None, layout, range(layout.rows), out, causal=causal, **options)
            return out
        self.write(k, v, keys, values, layout.out_slots)
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
        """Rows for ``decode`` and rows for ``extend``, int32."""
        rows = np.arange(layout.rows, dtype=np.int32)
        return rows[: layout.decodes], rows[layout.decodes :]


def choose(name: str | None, device: str) -> Backend:
    """The backend called ``name`` (None or "auto": the device's default) for "cpu" or "cuda".

    A backend that the device can't run is replaced by the default, with a warning;
    ``Backend.name`` tells which is in force. ValueError for an unknown name.
    """
    default = "cpu" if device == "cpu" else "torch_native"
    name = default if name in (None, "auto") else name
    if name not in ("cpu", "torch_native", "triton"):
        raise ValueError(f"unknown attention backend {name!r}: choose auto, cpu, torch_native or triton")
    if name == "triton" or (name == "cpu" and device != "cpu"):
        logger.warning("attention backend %r doesn't run on device %r yet; using %r", name, device, default)
        name = default
    if name == "cpu":
        return Backend(
            "cpu",
            attention_decode.decode_cpu,
            attention_extend.extend_cpu,
            kv_write.write_cpu,
            sample.sample_cpu,
            logprobs.logprobs_cpu,
        )
    return Backend(
        "torch_native",
        attention_decode.decode_reference,
        attention_extend.extend_reference,
        kv_write.write_reference,
        sample.sample_reference,
        logprobs.logprobs_reference,
    )
