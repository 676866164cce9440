"""Bounded types for fields of request bodies and of params structs; both processes import them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
TokenId = Int64  # compared with the vocabulary later, when the model is known
# Bounded, because they are copied for every sequence of a request.
RequestId = Annotated[str, Meta(max_length=256)]
CacheKey = Annotated[str, Meta(max_length=1024)]
