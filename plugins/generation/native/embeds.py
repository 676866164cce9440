"""``input_embeds``: prompts as vectors in place of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.server.api import locate_errors
from trunkline.core.types import EngineClient

FIELD = "input_embeds"
MAX_BYTES = 64 << 20  # of all sequences of a request, as float32
COMPONENT_BYTES = 8  # of a number as JSON, about: how much work it is to read them


async def read_embeds(engine: EngineClient, given: list[Any]) -> tuple[list[np.ndarray], bool]:
    """Float32 ``[T, width]`` of each prompt, and whether it was a single one. RequestError for any other form."""
    single = bool(given) and bool(given[0]) and not isinstance(given[0][0], list)
    prompts = [given] if single else given
    if not prompts:
        raise RequestError(f"{FIELD} cannot be empty.", param=FIELD)
    size = sum(len(row) for prompt in prompts for row in prompt if isinstance(row, list))
    arrays: list[np.ndarray] = await engine.off_loop(_convert, prompts, single, size=COMPONENT_BYTES * size)
    return arrays, single


def check_copies(arrays: list[np.ndarray], samples: int) -> None:
    """RequestError when the vectors of all samples together are too large to be handed to the engine."""
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
    if any(isinstance(number, list) for row in prompt for number in row):
        raise RequestError("vectors are nested too deeply; a prompt is a list of vectors, one for each token.")
    return np.array(prompt, np.float32)  # finite, because the body's numbers are bounded
