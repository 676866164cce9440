"""Powers of two for compiled loops in float32. Calls to libm wouldn't vectorise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .threads import OPTIONS

LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, **OPTIONS}  # NaN stays NaN

# numba freezes globals; typed ones keep float32 arithmetic from widening.
LOG2E, HALF, LEAST = np.float32(1.4426950408889634), np.float32(0.5), np.float32(-126.0)
# 2 ** f for -0.5 <= f <= 0.5, lowest power first: the Taylor polynomial, 1e-7 off at most.
POWER_OF_TWO = (
    *(1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158),
    *(0.009618129107628477, 0.0013333558146428443, 0.0001540353039338161),
)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = map(np.float32, POWER_OF_TWO)


def _power_of_two(f: Any) -> Any:
    return _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))


power_of_two = njit(**LOOPS)(_power_of_two)
