"""The tensors that stand for one quantised weight in a folder, and the integers in them."""

from __future__ import annotations

import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.sources.tensor_file import StoredTensor

WORD = 32  # bits


class Parts(dict[str, StoredTensor]):
    """The tensors of one layer by the last part of their names, such as "qweight"."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def __missing__(self, part: str) -> StoredTensor:
        raise ModelError(f"The checkpoint lacks {self.layer}.{part}, so that {self.layer} can't be read.")

    def sizes(self, part: str) -> tuple[int, int]:
        """The shape of a part that must be a matrix."""
        shape = self[part].shape
        if len(shape) != 2 or 0 in shape:
            raise ModelError(f"{self.layer}.{part} must be a matrix, not {list(shape)}.")
        return shape[0], shape[1]

    def check(self, part: str, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """ModelError unless a part has one of these shapes and the dtype, any floating dtype if None."""
        found = self[part]
        if tuple(found.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{self.layer}.{part} is {list(found.shape)}, expected is {expected}.")
        if found.dtype != dtype if dtype is not None else not found.dtype.is_floating_point:
            raise ModelError(f"{self.layer}.{part} is stored as {str(found.dtype).removeprefix('torch.')}.")


def check_groups(layer: str, inputs: int, count: int, groups: torch.Tensor | None) -> None:
    """ModelError unless ``count`` groups divide the inputs, or ``groups`` int64 [K] are numbers of them."""
    if groups is None and inputs % count:
        raise ModelError(f"{layer} has {inputs} inputs, which {count} groups don't divide.")
    if groups is not None and not bool(((groups >= 0) & (groups < count)).all()):
        raise ModelError(f"The inputs of {layer} have groups from {groups.min()} to {groups.max()}, not of {count}.")


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R, C, 32 / bits]: the unsigned integers of 4 or 8 bits in each word, lowest bits first."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, WORD // 8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(2)
