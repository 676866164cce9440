"""The sampling parameters of a request, as clients send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from trunkline.core.types import INT64_MAX, Count, Int64, TokenId
from trunkline.plugins.generation.schemas import Bias, GenerationParams, Grammar, Penalty

from .checks import CHECKS, GRAMMARS, IGNORED, UNSUPPORTED, check_bias, check_minimum, fail, read_grammar

GREEDY_BELOW = 1e-6  # lower temperatures mean greedy decoding
MAX_TEMPERATURE = 1e30  # higher ones are lowered to it: near 1e38 they would be infinite in float32
DEFAULT_NEW_TOKENS = 128
NO_LIMIT = -1  # in chat requests: as many tokens as fit into the context; /generate has null for it
DETERMINISTIC_SEED = 42  # of requests without a seed in the deterministic mode, as in SGLang


class SamplingParams(Struct, frozen=True, kw_only=True):
    """Checked sampling parameters of a prompt, under SGLang's names.

    They stay in the front, which needs some of them itself: ``n``, ``stream_interval``, ``skip_special_tokens`` and
    ``no_stop_trim``. :meth:`for_engine` makes the :class:`GenerationParams` of one sequence, in which the limit and
    the seed are set. ``max_new_tokens`` None: as many as the context allows; ``sampling_seed`` None: a random one,
    or :data:`DETERMINISTIC_SEED`.
    """

    max_new_tokens: Count | None = DEFAULT_NEW_TOKENS
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] = -1
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: Annotated[int, Meta(ge=1, le=INT64_MAX)] = 1
    stream_interval: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = None
    sampling_seed: Int64 | None = None
    min_new_tokens: Count = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    stop_regex: tuple[str, ...] = ()
    logit_bias: tuple[tuple[TokenId, Bias], ...] = ()
    custom_params: dict[str, Any] | None = None
    grammar: Grammar | None = None

    def for_engine(self, limit: int, seed: int, group: str = "") -> GenerationParams:
        """The engine's parameters of one sequence of the request ``group``, with at most ``limit`` new tokens."""
        greedy = self.temperature < GREEDY_BELOW or self.top_k == 1
        return GenerationParams(
            max_new_tokens=limit,
            temperature=0.0 if greedy else min(self.temperature, MAX_TEMPERATURE),
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_new_tokens=self.min_new_tokens,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            stop_regex=self.stop_regex,
            custom_params=self.custom_params,
            grammar=self.grammar,
            group=group if self.grammar is not None else "",
        )


def parse_sampling_params(
    requested: Mapping[str, Any],
    preferred: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Check the parameters of a request, which override the server's ``preferred`` ones. null means the default.

    ``names``: what the client calls a parameter, where that isn't its key. ``vocab_size``: the model's; None if the
    model isn't known yet. ``grammar``: one that the server's own code sets, of any kind; the client may then set none.
    RequestError for an invalid or unknown parameter, with its name.
    """
    preferred = preferred or {}
    if grammar is not None or any(requested.get(key) for key in GRAMMARS):
        preferred = {key: value for key, value in preferred.items() if key not in GRAMMARS}
    merged = {**preferred, **requested}
    names = names or {}
    values: dict[str, Any] = {}
    for key, value in merged.items():
        if key in CHECKS:
            if value is not None:
                values[key] = CHECKS[key](names.get(key, key), value)
            elif key == "max_new_tokens":
                values[key] = None
        elif key in UNSUPPORTED:
            UNSUPPORTED[key](names.get(key, key), value)
        elif key in IGNORED:
            if value is not None:
                IGNORED[key](names.get(key, key), value)
        else:
            known = ", ".join(f"`{name}`" for name in (*CHECKS, *UNSUPPORTED, *IGNORED))
            fail(key, f"unknown field `{key[:64]}`, expected one of {known}")
    grammar = read_grammar(values, names, grammar)
    sampling = SamplingParams(**values, grammar=grammar)
    check_minimum(names, sampling.min_new_tokens, sampling.max_new_tokens)
    if vocab_size is not None:
        check_bias(names.get("logit_bias", "logit_bias"), sampling.logit_bias, vocab_size)
    return sampling
