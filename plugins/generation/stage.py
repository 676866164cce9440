"""The stage of the generation task: samples the next token of each row and decides when a sequence ends."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec import structs

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, PartRow, Request, Stage, Step
from trunkline.plugins.generation.grammar.grammars import Grammars
from trunkline.plugins.generation.grammar.masks import Masks
from trunkline.plugins.generation.grammar.state import GrammarState
from trunkline.plugins.generation.sampling.adjust import Adjust, AdjustedRow, adjust_rows, adjusted_rows, kernel_arrays
from trunkline.plugins.generation.sampling.extensions import FAILED_MESSAGE, Extensions
from trunkline.plugins.generation.sampling.extra_results import (
    PartResults,
    hidden_states,
    output_logprobs,
    prompt_logprobs,
)
from trunkline.plugins.generation.sampling.extra_rows import RowSelection, make_extra_state, select_rows
from trunkline.plugins.generation.sampling.finish import SequenceState, end_ids_of, finish_reason, init_state
from trunkline.plugins.generation.sampling.routed_experts import capturer_of
from trunkline.plugins.generation.sampling.sampler import SampledTokens, Sampler

from .schemas import GenerationParams, GenerationResult, LogprobParams
from .settings import TASK, new_token_limit

log = logging.getLogger("trunkline.generation")

NOT_FINITE = "The model's logits were not finite (NaN or infinity); the request was ended."
NOT_FINITE_OF_EMBEDS = (
    "The model's logits for these input_embeds were not finite (NaN or infinity); send numbers of the size of the "
    "model's own embeddings."
)


class Prepared(NamedTuple):
    """What ``prepare`` keeps on the host; ``selection`` None: no request of the part has extra outputs."""

    selection: RowSelection | None
    adjusted: list[AdjustedRow]
    masks: Masks | None = None


class GenerationStage(Stage):
    """Generates one token per request and pass. ``request.state`` is a :class:`SequenceState`."""

    task = TASK
    decodes = True
    heads = ("lm",)
    params = GenerationParams
    result = GenerationResult

    def __init__(
        self, model: Model, sample: Sampler, adjust: Adjust, extensions: Extensions, grammars: Grammars
    ) -> None:
        self._model = model
        self._grammars = grammars
        self._sample = sample
        self._adjust = adjust
        self._extensions = extensions
        self._eos = end_ids_of(model)
        self._weights_id = secrets.randbits(63)  # a stage is made for one version of the weights
        # Request keys of the last pass, and the sampling parameters of these requests.
        self._last_parameters: tuple[list[int], dict[str, np.ndarray]] = ([], {})

    def before_admit(self, request: Request) -> Future[Any] | None:
        return self._grammars.compile(request)

    def admit(self, request: Request) -> Needs:
        params: GenerationParams = request.params
        if request.embeds is not None and params.logprobs is not None and params.logprobs.start is not None:
            raise RequestError("logprob_start_len must be -1 with input_embeds: they have no token ids to score.")
        limit = new_token_limit(request.prompt_len, params.max_new_tokens, self._model.max_request_tokens)
        grammar = self._grammars.begin(request)
        state = request.state = init_state(request, self._model, self._eos, limit, self._extensions)
        state.grammar = grammar
        adjusts = state.adjustment is not None and state.adjustment.lockstep
        needs = Needs(new_tokens=limit, lockstep=adjusts or grammar is not None)
        state.extras = make_extra_state(
            request,
            self._model.info.vocab_size,
            self._weights_id,
            lambda start: capturer_of(self._model).start(request.key, start),
        )
        return needs if state.extras is None else state.extras.added_to(needs)

    def adopt(self, request: Request) -> Needs:
        """Its limit is unchanged; end tokens, adjustments, conditions and the compiled grammar are the new model's.

        Extra outputs of a prompt are of the weights that computed the first token.
        """
        former: SequenceState = request.state
        grammar = self._grammars.begin(request)
        state = request.state = init_state(request, self._model, self._eos, former.limit, self._extensions)
        state.extras, state.grammar = former.extras, grammar
        if grammar is not None and former.grammar is not None:
            grammar.spent = former.grammar.spent
        if state.extras is None:
            return request.needs
        if not request.output_len:
            state.extras = state.extras.restarted()
        if state.extras.experts is not None:
            capturer_of(self._model).resume(request.key, state.extras.experts)
        return state.extras.added_to(request.needs)

    def reset(self, request: Request) -> Needs | None:
        extras = request.state.extras
        return None if extras is None else extras.added_to(request.needs)

    def release(self, request: Request) -> None:
        if request.state.grammar is not None:
            request.state.grammar.dropped = True
        if request.params.experts_from is not None:
            capturer_of(self._model).stop(request.key)

    def prepare(self, part: Part) -> None:
        selection = select_rows(part.rows)
        rows = part.rows if selection is None else selection.sampled
        adjusted = adjusted_rows(rows)
        part.inputs = Prepared(selection, adjusted)
        if selection is None and all(row.request.state.limit == 0 for row in rows):
            return  # nothing is sampled
        if (masks := self._grammars.start_masks(rows)) is not None:
            part.inputs = Prepared(selection, adjusted, masks)
            part.arrays["mask.rows"] = masks.rows
        part.arrays |= self._sampling_arrays(rows) | kernel_arrays(adjusted)
        part.arrays["last"] = np.array([row.offset + row.stop - row.first - 1 for row in rows], np.int64)
        part.arrays["position"] = np.array([row.end for row in rows], np.int64)
        if selection is not None:
            part.arrays |= selection.arrays()

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        prepared: Prepared = part.inputs
        if prepared.selection is not None:
            return self._launch_with_extras(part, prepared.selection, hidden)
        if not part.tensors:
            return Launched(torch.zeros(len(part.rows), dtype=torch.int64, device=hidden.device))
        return Launched(self._sample_tokens(part, hidden).ids)

    def _launch_with_extras(self, part: Part, selection: RowSelection, hidden: torch.Tensor) -> Launched:
        """:meth:`launch` for a part in which some request has extra outputs."""
        inputs = part.tensors
        next_ids = torch.zeros(len(part.rows), dtype=torch.int64, device=hidden.device)
        tensors: dict[str, torch.Tensor] = {}
        head, kernel = self._model.heads["lm"], self._model.backend.logprobs
        if selection.sampled:
            new = self._sample_tokens(part, hidden)
            next_ids[inputs["sampled.rows"]] = new.ids
            if selection.output.indices:
                tensors |= output_logprobs(selection.output, inputs, new.logits, new.ids, kernel)
        if selection.prompt.indices:
            tensors |= prompt_logprobs(selection.prompt, inputs, hidden, head, self._model.info.vocab_size, kernel)
        if selection.hidden_indices:
            tensors |= hidden_states(inputs, hidden)
        return Launched(next_ids, tensors)

    def _sample_tokens(self, part: Part, hidden: torch.Tensor) -> SampledTokens:
        """The next token of each sampled row."""
        inputs = part.tensors
        if len(inputs["last"]) != len(hidden):
            hidden = hidden[inputs["last"]]
        logits = self._model.heads["lm"](hidden).float()
        prepared: Prepared = part.inputs
        adjust_rows(self._adjust, prepared.adjusted, inputs, logits)
        self._grammars.apply(prepared.masks, inputs.get("mask.rows"), logits)
        parameters = [inputs[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position")]
        return SampledTokens(self._sample(logits, *parameters), logits)

    def _sampling_arrays(self, rows: Sequence[PartRow]) -> dict[str, np.ndarray]:
        """The parameters of :class:`Sampler`, each ``[R]``. They are reused while the rows stay the same."""
        keys = [row.request.key for row in rows]
        if keys != self._last_parameters[0]:
            params: list[GenerationParams] = [row.request.params for row in rows]
            self._last_parameters = (
                keys,
                {
                    "temperature": np.array([each.temperature for each in params], np.float32),
                    "top_k": np.array([each.top_k for each in params], np.int64),
                    "top_p": np.array([each.top_p for each in params], np.float32),
                    "min_p": np.array([each.min_p for each in params], np.float32),
                    "seed": np.array([each.seed for each in params], np.int64),
                },
            )
        return dict(self._last_parameters[1])

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        ids: list[int] = tensors["next_ids"].tolist()
        selection = part.inputs.selection
        if selection is None:
            return [self._step(row, token) for row, token in zip(part.rows, ids, strict=True)]
        results = PartResults(selection, tensors, self._weights_id)
        pairs = enumerate(zip(part.rows, ids, strict=True))
        return [step for index, (row, token) in pairs for step in self._steps(index, row, token, results)]

    def _step(self, row: PartRow, token: int) -> Step:
        """The step of a final row. A failure ends its request only; no retry is possible, as the state has changed."""
        request, state = row.request, row.request.state
        try:
            if state.limit == 0 and (state.extras is None or state.extras.logprobs is None):
                return Step(request, finish={"type": "length", "length": 0})
            grammar: GrammarState | None = state.grammar
            if grammar is not None:
                if grammar.late:
                    return Step(request, postponed=True)
                if grammar.over:
                    return Step(request, finish={"type": "stop", "matched": request.tokens[-1]})
                if 0 < state.limit <= request.output_len and grammar.failure is None:
                    return Step(request, finish={"type": "length", "length": state.limit})
                if token < 0 and grammar.failure is None and state.adjustment is not None:
                    return Step(request, error=grammar.no_token_error())
                if token >= 0:
                    grammar.accept(token)
                if grammar.failure is not None:
                    return Step(request, error=grammar.failure)
            if state.adjustment is not None and (error := state.adjustment.accept_token(token)) is not None:
                return Step(request, error=error)
            if token < 0:
                if request.embeds is not None:
                    return Step(request, error=RequestError(NOT_FINITE_OF_EMBEDS, param="input_embeds"))
                return Step(request, finish=abort(NOT_FINITE, 500, "InternalServerError"))
            if state.limit == 0:  # the token was sampled for its log-probabilities
                return Step(request, finish={"type": "length", "length": 0})
            return Step(request, (token,), finish=finish_reason(request, token))
        except RequestError as refusal:
            return Step(request, error=refusal)
        except Exception:
            return failed_step(request)

    def _steps(self, index: int, row: PartRow, token: int, part_results: PartResults) -> list[Step]:
        """The steps of the part's row ``index``, if some request of the part has extra outputs."""
        request = row.request
        step = self._step(row, token) if row.final else Step(request)
        failed = step.error is not None or (step.finish or {}).get("type") == "abort"
        if request.state.extras is None or failed or step.postponed:
            return [step]
        try:
            results = part_results.of(index, row, token, step)
            if row.final and request.state.limit and not step.tokens:  # a grammar's end was known late: not used
                results = [structs.replace(result, output=None, hidden=b"") for result in results]
            if results:
                request.state.extras.mark_sent(row)
        except Exception:
            return [failed_step(request)]
        if not results:
            return [step] if row.final else []
        return [*(Step(request, data=data) for data in results[:-1]), replace(step, data=results[-1])]

    def probe(self) -> tuple[list[int], GenerationParams]:
        return [0], GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)

    def close(self) -> None:
        self._grammars.close()

    def warm_up(self) -> list[tuple[list[int], GenerationParams]]:
        """Greedy, drawn from some of the tokens, with a penalty and a bias, and with log-probabilities."""
        self._grammars.warm_up()
        variants: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
            {"frequency_penalty": 0.5, "logit_bias": ((0, 1.0),)},
            {"logprobs": LogprobParams(start=0, top=2, ids=(0,))},
        ]
        return [([0], GenerationParams(max_new_tokens=2, ignore_eos=True, **each)) for each in variants]


def failed_step(request: Request) -> Step:
    """Log the current exception; the step that ends its request with a 500."""
    log.exception("request %s failed after sampling", request.rid)
    return Step(request, error=RequestError(FAILED_MESSAGE, status=500))


def abort(message: str, status: int | None = None, kind: str | None = None) -> dict[str, Any]:
    """A ``finish_reason`` of type abort."""
    return {"type": "abort", "message": message, "status_code": status, "err_type": kind}
