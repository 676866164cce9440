"""The least time of passes of a served model, at the rates that were measured on this GPU."""

from __future__ import annotations

import math

from gpu.context import Context
from trunkline.core.engine.lane import Lane


class Floor:
    """What the weights, keys and values, and products of a model take at least, each at the measured rate."""

    def __init__(self, context: Context, lane: Lane) -> None:
        assert lane.candidate is not None
        self.plan, self._bandwidth, self._flops = lane.candidate.plan, context.bandwidth, context.flops
        config = lane.candidate.info.config
        self._experts: int = config.get("num_experts", 1)
        self._chosen: int = config.get("num_experts_per_tok", 1)
        head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self._seen = 0.5 if lane.candidate.info.causal else 1.0  # share of the tokens that a token sees
        self._pair_flops: int = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * head_dim
        has_head = "Causal" in lane.candidate.info.architecture
        self._head: int = config["vocab_size"] * config["hidden_size"] if has_head else 0
        self._body: int = self.plan.active_parameters - self._head
        sizes = self.plan.shapes.items()
        self._routed = sum(math.prod(shape) for name, shape in sizes if ".experts." in name and len(shape) == 3)

    def weights(self, tokens: int) -> float:
        """Bytes of the weights that a pass reads: experts that no token was sent to aren't read (random routing)."""
        unused = (1 - self._chosen / self._experts) ** tokens if self._routed else 0.0
        always = self._body + self._head - self._routed * self._chosen / self._experts
        return (always + self._routed * (1 - unused)) * self.plan.dtype.itemsize

    def decode(self, rows: int, context: float) -> float:
        """Seconds of a step of ``rows`` rows over ``context`` tokens each: the larger of its bytes and its products."""
        moved = self.weights(rows) + rows * context * self.plan.kv_bytes_per_token
        flops = rows * (2 * (self._body + self._head) + self._pair_flops * context)
        return max(moved / self._bandwidth, flops / self._flops)

    def prompt(self, tokens: int) -> float:
        """Seconds of the products of a prompt; one row goes through the head."""
        flops = 2 * self._body * tokens + 2 * self._head + self._pair_flops * self._seen * tokens**2
        return max(flops / self._flops, self.weights(tokens) / self._bandwidth)
