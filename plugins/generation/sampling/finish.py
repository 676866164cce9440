"""When a sequence ends: at a stop string or expression, a stop token, a third party's condition, else its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Model, Request
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.text.regexes import StopRegexes, compile_regexes
from trunkline.plugins.generation.text.stops import find_stop
from trunkline.plugins.generation.text.stream import TextStream

from .adjust import Adjustment, find_adjustment
from .extensions import Condition, Extensions
from .rows import RowState


@dataclass(slots=True)
class Progress:
    """Per-request state. ``limit``: how many tokens may come. ``text``: with special tokens, if anything reads it.
    ``rows``: only of requests that get more than tokens."""

    limit: int
    stop_ids: frozenset[int]
    text: TextStream | None = None
    rows: RowState | None = None
    searched: int = 0  # no stop string begins before this character
    regexes: StopRegexes | None = None
    conditions: Sequence[tuple[Condition, Any]] = ()
    adjustment: Adjustment | None = None


def start(request: Request, model: Model, eos: frozenset[int], limit: int, extensions: Extensions) -> Progress:
    """The state of a request, which may have output already. RequestError when it can't be served."""
    params: GenerationParams = request.params
    extensions.check(params.custom_params)
    progress = Progress(limit, frozenset() if params.ignore_eos else eos.union(params.stop_token_ids))
    if params.stop_regex:
        try:
            progress.regexes = compile_regexes(params.stop_regex)
        except ValueError as error:
            raise RequestError(f"stop_regex {error}.", param="stop_regex") from error
    if model.tokenizer is None and (params.stop or params.stop_regex):
        field = "stop" if params.stop else "stop_regex"
        raise RequestError(f"{field} needs a tokenizer, and this model has none; use stop_token_ids.", param=field)
    progress.adjustment = find_adjustment(request, eos, model.info.vocab_size, extensions)
    progress.conditions = extensions.conditions(request)
    if model.tokenizer is not None and (params.stop or params.stop_regex or progress.conditions):
        progress.text = TextStream(model.tokenizer, request.tokens[: request.prompt_len], skip_special_tokens=False)
        for token in request.output:
            progress.text.push((token,))
    return progress


def finish_reason(request: Request, token: int) -> dict[str, Any] | None:
    """Why the sequence ends with ``token``, None if it goes on. RequestError when a third party's condition fails."""
    progress: Progress = request.state
    if progress.text is not None:
        progress.text.push((token,))
        if (stop := _stop_in_text(progress, request.params)) is not None:
            return {"type": "stop", "matched": stop}
    if token in progress.stop_ids:
        return {"type": "stop", "matched": token}
    if progress.conditions and (matched := _condition(progress, token)) is not None:
        return {"type": "stop", "matched": matched}
    if request.output_len + 1 >= progress.limit:
        return {"type": "length", "length": progress.limit}
    return None


def _stop_in_text(progress: Progress, params: GenerationParams) -> str | None:
    """The stop string or expression that the last token completes; the text contains special tokens, stop tokens
    among them."""
    assert progress.text is not None
    text = progress.text.text
    if params.stop:
        found = find_stop(text, params.stop, progress.searched)
        progress.searched = max(0, len(text) - max(map(len, params.stop)) + 1)
        if found is not None:
            return found[1]
    return None if progress.regexes is None else progress.regexes.search(text)


def _condition(progress: Progress, token: int) -> str | None:
    """What the first condition that ends the sequence says."""
    text = "" if progress.text is None else progress.text.text
    answers = (condition.matched(state, token, text) for condition, state in progress.conditions)
    return next((matched for matched in answers if matched is not None), None)
