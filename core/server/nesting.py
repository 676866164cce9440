"""How deep JSON is nested, told from its bytes: what walks a decoded value may recurse."""

from __future__ import annotations

import re

import numpy as np

MAX_DEPTH = 64  # more than any client needs, far less than what overflows a stack

_STRING = re.compile(rb'"[^"]*"')
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


def too_deep(body: bytes) -> bool:
    """Are arrays and objects of valid JSON nested more than :data:`MAX_DEPTH` deep?"""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    # Without escaped backslashes, a quote behind a backslash is escaped; without those, quotes are strings' ends.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    bare = np.frombuffer(_STRING.sub(b"", plain), np.uint8)
    return bool(_STEPS[bare].cumsum(dtype=np.int32).max(initial=0) > MAX_DEPTH)
