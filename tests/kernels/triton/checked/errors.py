"""What the checked interpreter raises."""

from __future__ import annotations


class KernelBug(AssertionError):
    """A kernel does what is wrong or undefined on a GPU.

    ``kind`` is one of bounds, alignment, overflow, poison, race, claim, assert. The launch adds a note with the
    kernel, the program and the seed of the program order.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
