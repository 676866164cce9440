"""A policy for Ray's autoscaler: enough replicas for the tokens of the requests that wait and run.

Ray pickles this module by value, so it keeps no state and imports nothing that does.
"""

from __future__ import annotations

import math
from typing import Any

TOKENS = "tokens"  # the metric that a replica gives: tokens of prompts that wait, and slots that requests hold


class RequestTokens:
    """Ray's ``autoscaling_config.policy.policy_function``; it applies its own bounds and delays to the result.

    ``tokens_per_replica``: what one replica should have, for example half of its KV pool.
    """

    def __init__(self, tokens_per_replica: int = 8192) -> None:
        if tokens_per_replica < 1:
            raise ValueError(f"tokens_per_replica must be at least 1, not {tokens_per_replica}")
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``context``: Ray's ``AutoscalingContext``. The number of replicas, and no state."""
        tokens = (context.aggregated_metrics or {}).get(TOKENS)
        if not tokens:  # no replica has reported yet
            return context.target_num_replicas, {}
        return math.ceil(sum(tokens.values()) / self._tokens_per_replica), {}
