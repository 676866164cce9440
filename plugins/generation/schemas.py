"""Parameters and results of the stage, which are sent between front and engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from trunkline.core.types import INT64_MAX, Count, Int64, TokenId

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-1e9, le=1e9)]


class Grammar(Struct, frozen=True):
    """What the output must match: ``text`` is a JSON Schema, a regular expression, a grammar in EBNF or Lark's syntax,
    or a structural tag (JSON). Clients can't send ``lark``; the server's own code makes such grammars."""

    kind: Literal["json_schema", "regex", "ebnf", "structural_tag", "lark"]
    text: str


class LogprobParams(Struct, frozen=True, omit_defaults=True):
    """Which log-probabilities are returned.

    For each output token, and for the prompt's tokens from position ``start`` on (None: for none of these): that of
    the token itself, those of the ``top`` most likely ids, and those of ``ids``. ``prompt_known``: the id of the
    weights with which another request has computed the prompt's already, None if none has.
    """

    start: Count | None = None
    top: Count = 0
    ids: tuple[TokenId, ...] = ()
    prompt_known: Int64 | None = None


class GenerationParams(Struct, frozen=True, omit_defaults=True):
    """How the engine generates one sequence; the values are checked already.

    Compared with the front's ``sampling.params.SamplingParams``, it is about one sample, its limit and seed are set,
    it has no parameters of the text, and it has the extra outputs (``extras.Extras``).

    ``temperature`` 0 is greedy decoding; ``top_k`` -1 and ``top_p`` 1 don't filter. The sampling noise of a token
    depends on ``seed`` and the token's position only. ``hidden_states``: of all positions that are computed, of the
    last one, or none. ``experts_from``: first position whose routed experts are returned; None returns none.
    ``group``: sequences with the same text are of one request, whose grammar may take a limited time for all of them.
    """

    max_new_tokens: Count = 128
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Int64 = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: Count = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    logit_bias: tuple[tuple[TokenId, Bias], ...] = ()
    stop_regex: tuple[str, ...] = ()
    custom_params: dict[str, Any] | None = None
    logprobs: LogprobParams | None = None
    hidden_states: Literal["", "last", "all"] = ""
    experts_from: Count | None = None
    grammar: Grammar | None = None
    group: str = ""


class LogprobTable(Struct, frozen=True, array_like=True):
    """Log-probabilities at R positions: float32, ids int32, little-endian. NaN where there is none."""

    chosen: bytes  # [R], of the sampled tokens or the prompt's
    top_ids: bytes = b""  # [R, top]: the most likely ids
    top: bytes = b""  # [R, top]: their log-probabilities
    ids: bytes = b""  # [R, len(ids)]: those of LogprobParams.ids
    chosen_ids: bytes = b""  # [R]: the sampled tokens; empty for the prompt's


class GenerationResult(Struct, frozen=True, omit_defaults=True):
    """Extra outputs of one step. Token ids are in ``Step.tokens``; requests without extra outputs have no results.

    ``output``: log-probabilities of the sampled token. ``prompt``: those of a chunk's tokens from position ``first``
    on. ``hidden``: hidden states from position ``hidden_at`` on, float32 ``[positions, hidden_size]``. ``experts``:
    routed experts, int32 ``[positions, layers, k]``, when the sequence has ended. Long data are sent in several
    results. ``weights_id``: of the weights in use, if the prompt's log-probabilities are requested. ``restart``: the
    request is computed anew, with other weights; what was sent of the prompt before is void.
    """

    output: LogprobTable | None = None
    prompt: LogprobTable | None = None
    first: Count = 0
    hidden: bytes = b""
    hidden_at: Count = 0
    experts: bytes = b""
    weights_id: Int64 = 0
    restart: bool = False
