"""Which quantised folders can be read: what config.json says about them, and how their layers are stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from trunkline.core.errors import ModelError

if TYPE_CHECKING:
    from .integers import Integers
    from .parts import Parts

KEY = "quantization_config"  # of config.json
Size = Annotated[int, Meta(ge=1, le=1 << 30)]


class Format(NamedTuple):
    """How quantised layers are stored. ``marks``: parts of a name of which a quantised layer has one."""

    name: str
    marks: tuple[str, ...]
    parts: frozenset[str]
    sizes: Callable[[Parts], tuple[int, int]]
    read: Callable[[Parts], Integers]


def find(config: dict[str, Any], where: str = f"{KEY} in its config.json") -> Format | None:
    """The format of a checkpoint by its config; None for plain weights. ModelError if it can't be read.

    ``where``: what describes the weights, for the message.
    """
    described = config.get(KEY)
    if described is None:
        return None
    method = str(described.get("quant_method")) if isinstance(described, dict) else "none"
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise ModelError(
            f"its weights are quantised as {method}, which can't be read; {known} and GGUF files can. Use one of "
            "these, or the float16, bfloat16 or float32 checkpoint."
        )
    kind, make = _METHODS[method]
    try:
        return make(msgspec.convert(described, kind))
    except msgspec.ValidationError as error:
        raise ModelError(f"{where} can't be read: {error}.") from error


def _only(method: str, key: str, found: object, known: tuple[object, ...]) -> None:
    """ModelError unless a value of the config is known."""
    if found not in known:
        names = ", ".join(str(one) for one in known)
        raise ModelError(f"its weights are quantised by {method} with {key} {found}; of {key}, {names} can be read.")


class _Packed(Struct):
    """Of GPTQ and AWQ. Different releases write the version of the format with different keys."""

    bits: int
    checkpoint_format: str | None = None
    version: str | None = None
    format: str | None = None
    is_marlin_format: bool | None = None
    rotation: str | None = None

    def check(self, method: str, bits: tuple[int, ...], versions: tuple[str, ...]) -> str:
        """The version, by default the first one. ModelError for others, or a model that can't be computed."""
        named = (key.lower() for key in (self.checkpoint_format, self.version, self.format) if key)
        version = "marlin" if self.is_marlin_format else next(named, versions[0])
        _only(method, "bits", self.bits, bits)
        _only(method, "format", version, versions)
        _only(method, "rotation", self.rotation or "none", ("none",))
        return version


def _gptq(described: _Packed) -> Format:
    from . import gptq

    version = described.check("gptq", gptq.BITS, ("gptq", "gptq_v2"))
    read = partial(gptq.read, minus_one=version == "gptq")
    return Format("gptq", (gptq.MARK,), gptq.PARTS, gptq.sizes, read)


def _awq(described: _Packed) -> Format:
    from . import awq

    described.check("awq", (awq.BITS,), ("gemm",))
    return Format("awq", (awq.MARK,), awq.PARTS, awq.sizes, awq.read)


class _Weights(Struct):
    num_bits: int
    strategy: str | None = None
    block_structure: tuple[Size, Size] | None = None


class _Group(Struct):
    weights: _Weights | None = None
    format: str | None = None


class _Compressed(Struct):
    config_groups: dict[str, _Group]
    format: str
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


_COMPRESSED_FORMATS = ("dense", "pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


def _compressed(described: _Compressed) -> Format:
    from . import compressed

    method, groups = "compressed-tensors", list(described.config_groups.values())
    for kind in {described.format, *(group.format for group in groups)} - {None, "mixed-precision"}:
        _only(method, "format", kind, _COMPRESSED_FORMATS)
    _only(method, "sparsity", (described.sparsity_config or {}).get("format", "dense"), ("dense",))
    if (described.transform_config or {}).get("config_groups"):
        raise ModelError(f"its weights are quantised by {method} with rotations, which can't be computed.")
    weights = [group.weights for group in groups if group.weights is not None]
    for one in weights:
        _only(method, "num_bits", one.num_bits, (4, 8))
    blocks = {one.block_structure if one.strategy == "block" else None for one in weights} or {None}
    if len(blocks) > 1:
        raise ModelError(f"its weights are quantised by {method} with several sizes of blocks.")
    (block,) = blocks
    return Format(
        method,
        (compressed.PACKED, compressed.SCALE),
        compressed.PARTS,
        partial(compressed.sizes, block=block),
        partial(compressed.read, block=block),
    )


_METHODS: dict[str, tuple[Any, Callable[[Any], Format]]] = {
    "gptq": (_Packed, _gptq),
    "awq": (_Packed, _awq),
    "compressed-tensors": (_Compressed, _compressed),
}
