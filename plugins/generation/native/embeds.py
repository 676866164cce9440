"""Reads ``input_embeds``: prompts that are embeddings in place of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.server.api import locate_errors
from trunkline.core.types import EngineClient

FIELD = "input_embeds"
MAX_BYTES = 64 << 20  # of the embeddings of all sequences of a request, as float32
COMPONENT_BYTES = 8  # of a component in JSON, about; a measure of the work to convert it


async def read_embeds(engine: EngineClient, value: list[Any]) -> tuple[list[np.ndarray], bool]:
    """Embeddings of each prompt, float32 ``[T, width]``, and whether ``value`` is one prompt instead of a list.

    RequestError if a prompt isn't a list of vectors of the same length.
    """
    single = bool(value) and bool(value[0]) and not isinstance(value[0][0], list)
    prompts = [value] if single else value
    if not prompts:
        raise RequestError(f"{FIELD} cannot be empty.", param=FIELD)
    size = sum(len(row) for prompt in prompts for row in prompt if isinstance(row, list))
    arrays: list[np.ndarray] = await engine.off_loop(_convert, prompts, single, size=COMPONENT_BYTES * size)
    return arrays, single


def check_copies(arrays: list[np.ndarray], samples: int) -> None:
    """RequestError if the embeddings of all sequences together are too large to be sent to the engine."""
    total = samples * sum(array.nbytes for array in arrays)
    if total > MAX_BYTES:
        raise RequestError(
            f"{FIELD} of all {samples * len(arrays)} sequences have {total} bytes as float32; at most {MAX_BYTES} are "
            "taken. Send fewer or shorter prompts, or a smaller n.",
            param=FIELD,
        )


def _convert(prompts: list[Any], single: bool) -> list[np.ndarray]:
    arrays = []
    for index, prompt in enumerate(prompts):
        with locate_errors(FIELD, index, single=single):
            arrays.append(_matrix(prompt))
    return arrays


def _matrix(prompt: list[Any]) -> np.ndarray:
    if not prompt:
        raise RequestError("a prompt's list of vectors cannot be empty.")
    if not all(isinstance(row, list) for row in prompt):
        raise RequestError("numbers and lists of numbers are mixed; a prompt is a list of vectors, one for each token.")
    widths = {len(row) for row in prompt}
    if len(widths) > 1 or 0 in widths:
        raise RequestError(
            f"all vectors of a prompt must have the same number of components, got {sorted(widths)[:8]}."
        )
    if any(isinstance(component, list) for row in prompt for component in row):
        raise RequestError("vectors are nested too deeply; a prompt is a list of vectors, one for each token.")
    return np.array(prompt, np.float32)  # finite, because the struct of the body bounds all components
