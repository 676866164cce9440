"""``2 ** x`` in float32 as a polynomial, for compiled loops: a call of libm would keep them from being vectorised."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .threads import OPTIONS

LOOPS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, **OPTIONS}  # NaN stays NaN

# numba compiles globals in as constants. Typed ones: a Python float would widen the arithmetic to float64.
LOG2E, HALF, LEAST = np.float32(1.4426950408889634), np.float32(0.5), np.float32(-126.0)
# 2 ** f for -0.5 <= f <= 0.5: the Taylor polynomial, lowest power first; its error is at most 1e-7.
EXP2_COEFFICIENTS = (
    *(1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158),
    *(0.009618129107628477, 0.0013333558146428443, 0.0001540353039338161),
)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = map(np.float32, EXP2_COEFFICIENTS)


def _exp2_fraction(f: Any) -> Any:
    return _E0 + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))


exp2_fraction = njit(**LOOPS)(_exp2_fraction)
