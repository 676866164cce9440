"""Reads the extra outputs that a body of ``/generate`` requests; each field has a value for all prompts, or a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Inputs, locate_errors
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.extras import NO_EXTRAS, Extras, check_logprob_ids, dense_model_error
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.schemas import LogprobParams
from trunkline.plugins.generation.settings import GenerationSettings, new_token_limit

from .body_schemas import GenerateBody

T = TypeVar("T")

MAX_TOP = 50  # top_logprobs_num
MAX_IDS = 1024  # number of ids in token_ids_logprob
# Limits for all sequences of a request together. They are lower for streams, each of whose frames has all data so far.
MAX_LOGPROBS, MAX_STREAMED_LOGPROBS = 1 << 21, 1 << 18
MAX_HIDDEN, MAX_STREAMED_HIDDEN = 1 << 23, 1 << 20  # components of hidden states
MAX_ROUTED = 1 << 21  # positions times layers

HiddenStates = Literal["", "last", "all"]


def read_extras(
    body: GenerateBody,
    served: ServedModel,
    settings: GenerationSettings,
    inputs: Inputs,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
) -> list[Extras]:
    """The extra outputs of each prompt. RequestError for invalid values and for more data than the limits allow."""
    count, n = len(prompts), sampling[0].n if sampling else 1
    _check_list("custom_logit_processor", body.custom_logit_processor, n)
    logprobs = _logprobs(body, served, inputs, prompts, n)
    hidden = _hidden_states(body, settings, count)
    if not (any(logprobs) or any(hidden) or body.return_routed_experts):
        return [NO_EXTRAS] * count
    experts = [_experts_from(body, served, inputs, index, len(prompt)) for index, prompt in enumerate(prompts)]
    extras = [
        Extras(logprobs=params, text=bool(body.return_text_in_logprobs), hidden_states=states, experts_from=start)
        for params, states, start in zip(logprobs, hidden, experts, strict=True)
    ]
    _check_sizes(extras, prompts, sampling, served, stream=bool(body.stream))
    return extras


def _per_prompt(name: str, value: Any, default: T, count: int, n: int) -> list[T]:
    """The value for each of ``count`` prompts; null means ``default``."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    _check_list(name, value, n)
    if len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} entries for a batch of {count}; give one value, or one per prompt.", param=name
        )
    return [default if item is None else item for item in value]


def _check_list(name: str, value: Any, n: int) -> None:
    """RequestError for a list if each prompt has several samples, as in SGLang."""
    if isinstance(value, list) and n > 1:
        raise RequestError(f"Cannot use list {name} with parallel_sample_num > 1", param=name)


# -- log-probabilities -------------------------------------------------------------------------


def _logprobs(
    body: GenerateBody, served: ServedModel, inputs: Inputs, prompts: Sequence[list[int]], n: int
) -> list[LogprobParams | None]:
    count = len(prompts)
    requested = _per_prompt("return_logprob", body.return_logprob, False, count, n)
    starts = _per_prompt("logprob_start_len", body.logprob_start_len, -1, count, n)
    tops = _per_prompt("top_logprobs_num", body.top_logprobs_num, 0, count, n)
    ids = _token_ids(body, count, n, single=inputs.single)
    logprobs: list[LogprobParams | None] = []
    for index, prompt in enumerate(prompts):
        params = None
        if requested[index]:
            with locate_errors(inputs.field, index, single=inputs.single):
                params = _logprob_params(starts[index], tops[index], ids[index], len(prompt), served)
        logprobs.append(params)
    return logprobs


def _token_ids(body: GenerateBody, count: int, n: int, *, single: bool) -> list[tuple[int, ...]]:
    """``token_ids_logprob`` of each prompt: an id, a list of ids, or for a batch a list of lists; null is empty."""
    name, value = "token_ids_logprob", body.token_ids_logprob
    if value is None or value == []:
        return [()] * count
    if isinstance(value, int):
        return [(value,)] * count
    nested = any(isinstance(item, list) for item in value) or all(item is None for item in value)
    if nested:
        _check_list(name, value, n)
    lists = _per_prompt(name, value, [], count, n) if nested and not single else [value] * count
    return [tuple(_flat(ids)) for ids in lists]


def _flat(value: Any) -> Iterator[int]:
    for token in value if isinstance(value, list) else [None]:
        if not isinstance(token, int):
            raise RequestError("token_ids_logprob must be a flat list of integers.", param="token_ids_logprob")
        yield token


def _logprob_params(start: int, top: int, ids: tuple[int, ...], length: int, served: ServedModel) -> LogprobParams:
    if start < -1:
        raise RequestError(
            f"logprob_start_len must be -1 (output tokens only) or at least 0, got {start}.", param="logprob_start_len"
        )
    if start > length:
        raise RequestError(
            f"req.logprob_start_len={start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={length}. Please use a smaller logprob_start_len.",
            param="logprob_start_len",
        )
    if not 0 <= top <= MAX_TOP:
        bound = f"at most {MAX_TOP}" if top > 0 else "at least 0"
        raise RequestError(f"top_logprobs_num must be {bound}, got {top}.", param="top_logprobs_num")
    if len(ids) > MAX_IDS:
        raise RequestError(
            f"token_ids_logprob may have at most {MAX_IDS} ids, got {len(ids)}.", param="token_ids_logprob"
        )
    check_logprob_ids(ids, served.info.vocab_size)
    return LogprobParams(None if start < 0 else start, top, ids)


# -- hidden states and experts -----------------------------------------------------------------


def _hidden_states(body: GenerateBody, settings: GenerationSettings, count: int) -> list[HiddenStates]:
    name, value = "return_hidden_states", body.return_hidden_states
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    modes = [_hidden_states_mode(item) for item in values]
    if any(modes) and not settings.enable_return_hidden_states:
        raise RequestError(
            "The server is not configured to return the hidden states. "
            "Please set `--enable-return-hidden-states` to enable this feature.",
            param=name,
        )
    return modes


def _hidden_states_mode(value: bool | str | None) -> HiddenStates:
    lowered = value.lower() if isinstance(value, str) else value
    if lowered in (None, False, "false"):
        return ""
    if lowered in (True, "true"):
        return "all"
    if value != "last":
        raise RequestError(
            "return_hidden_states must be a boolean or the string literal 'last'.", param="return_hidden_states"
        )
    return "last"


def _experts_from(body: GenerateBody, served: ServedModel, inputs: Inputs, index: int, length: int) -> int | None:
    """``routed_experts_start_len`` if routed experts are requested, else None."""
    if not body.return_routed_experts:
        return None
    if not served.info.num_experts:
        raise dense_model_error(served.name)
    start, name = body.routed_experts_start_len or 0, "routed_experts_start_len"
    with locate_errors(inputs.field, index, single=inputs.single):
        if start < 0:
            raise RequestError(
                f"recv_req.{name}={start} is lower than 0. Please use a non-negative {name}.", param=name
            )
        if start > length:
            raise RequestError(
                f"recv_req.{name}={start} is higher than the number of input tokens "
                f"len(req.origin_input_ids)={length}. Please use a smaller {name}.",
                param=name,
            )
    return start


# -- limits ------------------------------------------------------------------------------------


def _check_sizes(
    extras: Sequence[Extras],
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    served: ServedModel,
    *,
    stream: bool,
) -> None:
    """RequestError if the reply could have more data than the limits at the top of this file."""
    sizes = list(_max_sizes(extras, prompts, sampling, served))
    logprobs, hidden, routed = (sum(kind) for kind in zip(*sizes, strict=True))
    max_logprobs, max_hidden = (MAX_STREAMED_LOGPROBS, MAX_STREAMED_HIDDEN) if stream else (MAX_LOGPROBS, MAX_HIDDEN)
    fewer = "Lower max_new_tokens or n, or split the request"
    unstreamed = ", or don't stream it" if stream else ""
    if logprobs > max_logprobs:
        raise RequestError(
            f"The request asks for up to {logprobs} log-probabilities; at most {max_logprobs} are returned at once. "
            f"{fewer}{unstreamed}; a lower top_logprobs_num, fewer token_ids_logprob and a higher "
            "logprob_start_len help, too.",
            param="return_logprob",
        )
    if hidden > max_hidden:
        raise RequestError(
            f"The request asks for up to {hidden} numbers of hidden states; at most {max_hidden} are returned at "
            f"once. {fewer}{unstreamed}; 'last' asks for one vector.",
            param="return_hidden_states",
        )
    if routed > MAX_ROUTED:
        raise RequestError(
            f"The request asks for the experts of up to {routed} positions, counted per layer; at most "
            f"{MAX_ROUTED} are returned at once. {fewer}; a higher routed_experts_start_len helps, too.",
            param="return_routed_experts",
        )


def _max_sizes(
    extras: Sequence[Extras], prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], served: ServedModel
) -> Iterator[tuple[int, int, int]]:
    """Upper bounds for each prompt's sequences: log-probabilities, components of hidden states, positions * layers."""
    limit, layers = served.max_request_tokens, _layer_count(served)
    for extra, prompt, params in zip(extras, prompts, sampling, strict=True):
        length = len(prompt)
        requested = limit if params.max_new_tokens is None else params.max_new_tokens
        new = max(1, new_token_limit(length, requested, limit))
        logprobs = hidden = routed = 0
        if extra.logprobs is not None:
            rows = new if extra.logprobs.start is None else new + length - extra.logprobs.start
            logprobs = rows * (1 + extra.logprobs.top + len(extra.logprobs.ids))
        if extra.hidden_states:
            hidden = served.info.hidden_size * (length + new if extra.hidden_states == "all" else 1)
        if extra.experts_from is not None:
            routed = (length + new - extra.experts_from) * layers
        yield logprobs * params.n, hidden * params.n, routed * params.n


def _layer_count(served: ServedModel) -> int:
    """Number of decoder layers; if the config doesn't have it, more than any model has."""
    config = served.info.config
    return int(config.get("text_config", config).get("num_hidden_layers", 256))
