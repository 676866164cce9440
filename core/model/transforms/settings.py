"""The settings of core's own transforms."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

GROUP = "quantization"


class QuantizationSettings(Struct, frozen=True, kw_only=True):
    """How weights are stored: TOML table ``[quantization]``, or keys of a ``[[models]]`` table."""

    quantization: Annotated[
        Literal["int8", "int4"] | None,
        Meta(
            description=(
                "On a CPU, store the weights of layers and experts as integers of 8 or 4 bits, and multiply int8 "
                "numbers; by default they have the --dtype."
            )
        ),
    ] = None
