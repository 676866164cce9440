"""Decides when a sequence ends: at a stop string or expression, a stop token, a plugin's stop condition, the end of its
grammar, its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Model, Request
from trunkline.plugins.generation.grammar.state import GrammarState
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.text.detokenizer import IncrementalDetokenizer
from trunkline.plugins.generation.text.regexes import StopRegexes, compile_regexes
from trunkline.plugins.generation.text.stops import find_stop

from .adjust import Adjustment, make_adjustment
from .extensions import Condition, Extensions
from .extra_rows import ExtraState


@dataclass(slots=True)
class SequenceState:
    """The stage's state of a request (``Request.state``)."""

    limit: int  # on output tokens
    stop_ids: frozenset[int]
    text: IncrementalDetokenizer | None = None  # with special tokens; None if no stop string or condition needs it
    extras: ExtraState | None = None  # None if only tokens are returned
    searched: int = 0  # no stop string begins before this character of the text
    regexes: StopRegexes | None = None
    conditions: Sequence[tuple[Condition, Any]] = ()
    adjustment: Adjustment | None = None
    grammar: GrammarState | None = None


def end_ids_of(model: Model) -> frozenset[int]:
    """The ids that end a sequence: the checkpoint's and the tokenizer's."""
    own = None if model.tokenizer is None else model.tokenizer.eos_token_id
    return frozenset(model.info.eos_token_ids) | ({own} if own is not None else set())


def init_state(
    request: Request, model: Model, eos: frozenset[int], limit: int, extensions: Extensions
) -> SequenceState:
    """The initial state of a request, which may have output already. RequestError if it can't be served."""
    params: GenerationParams = request.params
    extensions.check(params.custom_params)
    stop_ids = frozenset() if params.ignore_eos else eos.union(params.stop_token_ids)
    if params.grammar is not None:
        stop_ids |= eos  # it allows them only at its end, and they end it; known here without its matcher
    state = SequenceState(limit, stop_ids)
    if params.stop_regex:
        try:
            state.regexes = compile_regexes(params.stop_regex)
        except ValueError as error:
            raise RequestError(f"stop_regex {error}.", param="stop_regex") from error
    if model.tokenizer is None and (params.stop or params.stop_regex):
        field = "stop" if params.stop else "stop_regex"
        raise RequestError(f"{field} needs a tokenizer, and this model has none; use stop_token_ids.", param=field)
    state.adjustment = make_adjustment(request, eos, model.info.vocab_size, extensions)
    state.conditions = extensions.conditions(request)
    if model.tokenizer is not None and (params.stop or params.stop_regex or state.conditions):
        state.text = IncrementalDetokenizer(
            model.tokenizer, request.tokens[: request.prompt_len], skip_special_tokens=False
        )
        for token in request.output:
            state.text.push((token,))
    return state


def finish_reason(request: Request, token: int) -> dict[str, Any] | None:
    """The finish reason if ``token`` ends the sequence, else None. RequestError if a plugin's condition fails.

    None at the limit, too, while a mask thread hasn't accepted the token.
    """
    state: SequenceState = request.state
    if state.text is not None:
        state.text.push((token,))
        if (stop := _stop_in_text(state, request.params)) is not None:
            return {"type": "stop", "matched": stop}
    if token in state.stop_ids:
        return {"type": "stop", "matched": token}
    if state.conditions and (matched := _matched_condition(state, token)) is not None:
        return {"type": "stop", "matched": matched}
    if state.grammar is not None and state.grammar.finished:
        return {"type": "stop", "matched": token}
    if request.output_len + 1 >= state.limit:
        if state.grammar is not None and state.grammar.behind:  # a later pass tells whether it ends here
            state.grammar.complete = True
            return None
        return {"type": "length", "length": state.limit}
    return None


def _stop_in_text(state: SequenceState, params: GenerationParams) -> str | None:
    """The stop string or expression that the last token completes, in the text with special tokens."""
    assert state.text is not None
    text = state.text.text
    if params.stop:
        match = find_stop(text, params.stop, state.searched)
        state.searched = max(0, len(text) - max(map(len, params.stop)) + 1)
        if match is not None:
            return match[1]
    return None if state.regexes is None else state.regexes.search(text)


def _matched_condition(state: SequenceState, token: int) -> str | None:
    """The return value of the first condition that ends the sequence."""
    text = "" if state.text is None else state.text.text
    results = (condition.matched(own_state, token, text) for condition, own_state in state.conditions)
    return next((matched for matched in results if matched is not None), None)
