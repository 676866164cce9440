"""When a sequence ends: at a stop string, else a stop token, else its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trunkline.core.types import Request
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.text.stops import find_stop
from trunkline.plugins.generation.text.stream import TextStream

from .rows import RowState


@dataclass(slots=True)
class Progress:
    """Per-request state. ``limit``: how many tokens may come. ``text``: with special tokens; only with stop strings.
    ``rows``: only of requests that get more than tokens."""

    limit: int
    stop_ids: frozenset[int]
    text: TextStream | None
    rows: RowState | None = None
    searched: int = 0  # no stop string begins before this character


def finish_reason(request: Request, token: int) -> dict[str, Any] | None:
    """Why the sequence ends with ``token``, None if it goes on."""
    progress: Progress = request.state
    if progress.text is not None and (stop := _stop_string(progress, request.params, token)) is not None:
        return {"type": "stop", "matched": stop}
    if token in progress.stop_ids:
        return {"type": "stop", "matched": token}
    if request.output_len + 1 >= progress.limit:
        return {"type": "length", "length": progress.limit}
    return None


def _stop_string(progress: Progress, params: GenerationParams, token: int) -> str | None:
    """The stop string that ``token`` completes; the text contains special tokens, stop tokens among them."""
    assert progress.text is not None
    progress.text.push((token,))
    text = progress.text.text
    found = find_stop(text, params.stop, progress.searched)
    progress.searched = max(0, len(text) - max(map(len, params.stop)) + 1)
    return None if found is None else found[1]
