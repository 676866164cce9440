"""What the prompts of a body ask for beside text: one value for all of them, or a list with one for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Inputs, locate_errors
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.extras import NOTHING, Extras, check_asked_ids, dense_model_error
from trunkline.plugins.generation.sampling.params import Sampling
from trunkline.plugins.generation.schemas import LogprobParams
from trunkline.plugins.generation.settings import GenerationSettings, new_token_limit

from .body_schemas import GenerateBody

T = TypeVar("T")

MAX_TOP = 50  # most likely ids of a position
MAX_IDS = 1024  # asked-for ids of a position
# Of all sequences of a request together. Frames of a stream repeat what the frames before had.
MAX_LOGPROBS, MAX_STREAMED_LOGPROBS = 1 << 21, 1 << 18
MAX_HIDDEN, MAX_STREAMED_HIDDEN = 1 << 23, 1 << 20  # numbers
MAX_ROUTED = 1 << 21  # positions times layers

Hidden = Literal["", "last", "all"]


def read_extras(
    body: GenerateBody,
    served: ServedModel,
    settings: GenerationSettings,
    inputs: Inputs,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
) -> list[Extras]:
    """One for each prompt. RequestError for what can't be served, or would be too much."""
    count, n = len(prompts), samplings[0].n if samplings else 1
    _check_list("custom_logit_processor", body.custom_logit_processor, n)
    logprobs = _logprobs(body, served, inputs, prompts, n)
    hidden = _hidden_states(body, settings, count)
    if not (any(logprobs) or any(hidden) or body.return_routed_experts):
        return [NOTHING] * count
    experts = [_experts_from(body, served, inputs, index, len(prompt)) for index, prompt in enumerate(prompts)]
    extras = [
        Extras(logprobs=one, text=bool(body.return_text_in_logprobs), hidden_states=states, experts_from=start)
        for one, states, start in zip(logprobs, hidden, experts, strict=True)
    ]
    _check_sizes(extras, prompts, samplings, served, stream=bool(body.stream))
    return extras


def _each(name: str, value: Any, default: T, count: int, n: int) -> list[T]:
    """``value`` for each of ``count`` prompts; null is the default."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    _check_list(name, value, n)
    if len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} entries for a batch of {count}; give one value, or one a prompt.", param=name
        )
    return [default if one is None else one for one in value]


def _check_list(name: str, value: Any, n: int) -> None:
    """RequestError for a list where each prompt has several samples."""
    if isinstance(value, list) and n > 1:
        raise RequestError(f"Cannot use list {name} with parallel_sample_num > 1", param=name)


# -- log-probabilities -------------------------------------------------------------------------


def _logprobs(
    body: GenerateBody, served: ServedModel, inputs: Inputs, prompts: Sequence[list[int]], n: int
) -> list[LogprobParams | None]:
    count = len(prompts)
    wanted = _each("return_logprob", body.return_logprob, False, count, n)
    starts = _each("logprob_start_len", body.logprob_start_len, -1, count, n)
    tops = _each("top_logprobs_num", body.top_logprobs_num, 0, count, n)
    ids = _asked_ids(body, count, n, single=inputs.single)
    found: list[LogprobParams | None] = []
    for index, prompt in enumerate(prompts):
        with locate_errors(inputs.field, index, single=inputs.single):
            one = _checked(starts[index], tops[index], ids[index], len(prompt), served) if wanted[index] else None
        found.append(one)
    return found


def _asked_ids(body: GenerateBody, count: int, n: int, *, single: bool) -> list[tuple[int, ...]]:
    """``token_ids_logprob``: an id, a list of ids, or for a batch a list of lists; what is empty is null."""
    name, value = "token_ids_logprob", body.token_ids_logprob
    if value is None or value == []:
        return [()] * count
    if isinstance(value, int):
        return [(value,)] * count
    nested = any(isinstance(one, list) for one in value) or all(one is None for one in value)
    if nested:
        _check_list(name, value, n)
    lists = _each(name, value, [], count, n) if nested and not single else [value] * count
    return [tuple(_flat(ids)) for ids in lists]


def _flat(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, list) else [None]:
        if not isinstance(one, int):
            raise RequestError("token_ids_logprob must be a flat list of integers.", param="token_ids_logprob")
        yield one


def _checked(start: int, top: int, ids: tuple[int, ...], length: int, served: ServedModel) -> LogprobParams:
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
    check_asked_ids(ids, served.info.vocab_size)
    return LogprobParams(None if start < 0 else start, top, ids)


# -- hidden states and experts -----------------------------------------------------------------


def _hidden_states(body: GenerateBody, settings: GenerationSettings, count: int) -> list[Hidden]:
    name, value = "return_hidden_states", body.return_hidden_states
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise RequestError(f"The length of {name} should be equal to the batch size.", param=name)
    modes = [_mode(one) for one in values]
    if any(modes) and not settings.enable_return_hidden_states:
        raise RequestError(
            "The server is not configured to return the hidden states. "
            "Please set `--enable-return-hidden-states` to enable this feature.",
            param=name,
        )
    return modes


def _mode(value: bool | str | None) -> Hidden:
    lax = value.lower() if isinstance(value, str) else value
    if lax in (None, False, "false"):
        return ""
    if lax in (True, "true"):
        return "all"
    if value != "last":
        raise RequestError(
            "return_hidden_states must be a boolean or the string literal 'last'.", param="return_hidden_states"
        )
    return "last"


def _experts_from(body: GenerateBody, served: ServedModel, inputs: Inputs, index: int, length: int) -> int | None:
    """``routed_experts_start_len`` if the experts are wanted."""
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


# -- how much of it ----------------------------------------------------------------------------


def _check_sizes(
    extras: Sequence[Extras],
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    served: ServedModel,
    *,
    stream: bool,
) -> None:
    """RequestError when the answer could have more than a server should hold, encode and send at once."""
    sizes = list(_sizes(extras, prompts, samplings, served))
    logprobs, hidden, routed = (sum(kind) for kind in zip(*sizes, strict=True))
    most, most_hidden = (MAX_STREAMED_LOGPROBS, MAX_STREAMED_HIDDEN) if stream else (MAX_LOGPROBS, MAX_HIDDEN)
    fewer = "Lower max_new_tokens or n, or split the request"
    unstreamed = ", or don't stream it" if stream else ""
    if logprobs > most:
        raise RequestError(
            f"The request asks for up to {logprobs} log-probabilities; at most {most} are returned at once. "
            f"{fewer}{unstreamed}; a lower top_logprobs_num, fewer token_ids_logprob and a higher "
            "logprob_start_len help, too.",
            param="return_logprob",
        )
    if hidden > most_hidden:
        raise RequestError(
            f"The request asks for up to {hidden} numbers of hidden states; at most {most_hidden} are returned at "
            f"once. {fewer}{unstreamed}; 'last' asks for one vector.",
            param="return_hidden_states",
        )
    if routed > MAX_ROUTED:
        raise RequestError(
            f"The request asks for the experts of up to {routed} positions, counted once a layer; at most {MAX_ROUTED} "
            f"are returned at once. {fewer}; a higher routed_experts_start_len helps, too.",
            param="return_routed_experts",
        )


def _sizes(
    extras: Sequence[Extras], prompts: Sequence[list[int]], samplings: Sequence[Sampling], served: ServedModel
) -> Iterator[tuple[int, int, int]]:
    """Of each prompt's sequences: log-probabilities, numbers of hidden states, positions times layers; at most."""
    limit, layers = served.max_request_tokens, _layers(served)
    for one, prompt, sampling in zip(extras, prompts, samplings, strict=True):
        wanted = limit if sampling.max_new_tokens is None else sampling.max_new_tokens
        length = len(prompt)
        new = max(1, new_token_limit(length, wanted, limit))
        logprobs = hidden = routed = 0
        if one.logprobs is not None:
            rows = new if one.logprobs.start is None else new + length - one.logprobs.start
            logprobs = rows * (1 + one.logprobs.top + len(one.logprobs.ids))
        if one.hidden_states:
            hidden = served.info.hidden_size * (length + new if one.hidden_states == "all" else 1)
        if one.experts_from is not None:
            routed = (length + new - one.experts_from) * layers
        yield logprobs * sampling.n, hidden * sampling.n, routed * sampling.n


def _layers(served: ServedModel) -> int:
    """Decoder layers; more than any model has, where the config doesn't say."""
    config = served.info.config
    return int(config.get("text_config", config).get("num_hidden_layers", 256))
