"""The engine's part of generation: sample the next token of each row, decide when to stop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, PartRow, Request, Stage, Step
from trunkline.plugins.generation.sampling.adjust import Adjust, Adjuster
from trunkline.plugins.generation.sampling.experts import keeper_of
from trunkline.plugins.generation.sampling.extensions import FAILED, Extensions
from trunkline.plugins.generation.sampling.finish import Progress, finish_reason, start
from trunkline.plugins.generation.sampling.row_results import (
    PassResults,
    hidden_rows,
    output_logprobs,
    prompt_logprobs,
)
from trunkline.plugins.generation.sampling.rows import PassPlan, plan_pass, row_state

from .schemas import GenerationParams, GenerationResult
from .settings import TASK, new_token_limit

log = logging.getLogger("trunkline.generation")

NOT_FINITE = "The model's logits were not finite (NaN or infinity); the request was ended."


class Sampler(Protocol):
    """``kernels.sample``: one id per row of float32 logits ``[R, V]``, -1 for a row that isn't finite."""

    def __call__(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
        /,
    ) -> torch.Tensor: ...


class Drawn(NamedTuple):
    """New tokens: ``ids`` int64 ``[R]``, drawn from ``logits`` float32 ``[R, V]`` at a ``temperature`` ``[R]``."""

    ids: torch.Tensor
    logits: torch.Tensor
    temperature: torch.Tensor


class GenerationStage(Stage):
    """One token per request and pass."""

    task = TASK
    decodes = True
    heads = ("lm",)
    params = GenerationParams
    result = GenerationResult

    def __init__(self, model: Model, sample: Sampler, adjust: Adjust, extensions: Extensions) -> None:
        self._model = model
        self._sample = sample
        self._adjust = Adjuster(adjust)
        self._extensions = extensions
        tokenizer = model.tokenizer
        own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._eos = frozenset(model.info.eos_token_ids) | frozenset(own)
        self._batch: tuple[list[int], list[torch.Tensor]] = ([], [])  # request keys and their parameter tensors

    def admit(self, request: Request) -> Needs:
        params: GenerationParams = request.params
        if request.embeds is not None and params.logprobs is not None and params.logprobs.start is not None:
            raise RequestError("logprob_start_len must be -1 with input_embeds: they have no token ids to score.")
        limit = new_token_limit(request.prompt_len, params.max_new_tokens, self._model.max_request_tokens)
        request.state = start(request, self._model, self._eos, limit, self._extensions)
        adjustment = request.state.adjustment
        needs = Needs(new_tokens=limit, lockstep=adjustment is not None and adjustment.lockstep)
        rows = request.state.rows = row_state(
            request, self._model.info.vocab_size, lambda start: keeper_of(self._model).keep(request.key, start)
        )
        return needs if rows is None else rows.added_to(needs)

    def adopt(self, request: Request) -> Needs:
        """All that was counted goes on; which tokens end it, and who else has a say, is up to the new checkpoint."""
        former: Progress = request.state
        request.state = start(request, self._model, self._eos, former.limit, self._extensions)
        rows = request.state.rows = former.rows
        if rows is None:
            return request.needs
        if rows.choices is not None:
            keeper_of(self._model).keep_on(request.key, rows.choices)
        return rows.added_to(request.needs)

    def reset(self, request: Request) -> Needs | None:
        rows = request.state.rows
        return None if rows is None else rows.added_to(request.needs)

    def release(self, request: Request) -> None:
        if request.params.experts_from is not None:
            keeper_of(self._model).drop(request.key)

    def prepare(self, part: Part) -> None:
        part.inputs = plan_pass(part.rows)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        plan: PassPlan | None = part.inputs
        if plan is not None:
            return self._launch_planned(part, plan, hidden)
        if all(row.request.state.limit == 0 for row in part.rows):
            return Launched(torch.zeros(len(part.rows), dtype=torch.int64, device=hidden.device))
        return Launched(self._draw(part.rows, hidden).ids)

    def _launch_planned(self, part: Part, plan: PassPlan, hidden: torch.Tensor) -> Launched:
        """A pass of which some request wants more than a token."""
        next_ids = torch.zeros(len(part.rows), dtype=torch.int64, device=hidden.device)
        tensors: dict[str, torch.Tensor] = {}
        head, kernel = self._model.heads["lm"], self._model.backend.logprobs
        if plan.sampled:
            drawn = self._draw(plan.sampled, hidden)
            next_ids[torch.tensor(plan.places, device=hidden.device)] = drawn.ids
            if plan.output.at:
                tensors |= output_logprobs(plan.output, drawn.logits, drawn.temperature, drawn.ids, kernel)
        if plan.prompt.at:
            tensors |= prompt_logprobs(plan.prompt, hidden, head, self._model.info.vocab_size, kernel)
        if plan.hidden_at:
            tensors |= hidden_rows(plan.hidden_at, hidden)
        return Launched(next_ids, tensors)

    def _draw(self, rows: Sequence[PartRow], hidden: torch.Tensor) -> Drawn:
        """The next token of each row, and what it was drawn from."""
        if len(rows) != len(hidden):
            last = [row.offset + row.end - row.first - 1 for row in rows]
            hidden = hidden[torch.tensor(last, device=hidden.device)]
        logits = self._model.heads["lm"](hidden).float()
        self._adjust(rows, logits)
        position = torch.tensor([row.end for row in rows], device=hidden.device)
        temperature, top_k, top_p, min_p, seed = self._parameters(rows, hidden.device)
        return Drawn(self._sample(logits, temperature, top_k, top_p, min_p, seed, position), logits, temperature)

    def _parameters(self, rows: Sequence[PartRow], device: torch.device) -> list[torch.Tensor]:
        """Temperature, top_k, top_p, min_p and seed, each ``[R]``; the same rows decode for many passes."""
        keys = [row.request.key for row in rows]
        if keys != self._batch[0]:
            params: list[GenerationParams] = [row.request.params for row in rows]
            columns: list[Any] = [
                torch.tensor([p.temperature for p in params], dtype=torch.float32),
                torch.tensor([p.top_k for p in params], dtype=torch.int64),
                torch.tensor([p.top_p for p in params], dtype=torch.float32),
                torch.tensor([p.min_p for p in params], dtype=torch.float32),
                torch.tensor([p.seed for p in params], dtype=torch.int64),
            ]
            self._batch = (keys, [column.to(device) for column in columns])
        return self._batch[1]

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        ids: list[int] = tensors["next_ids"].tolist()
        if part.inputs is None:
            return [self._step(row, token) for row, token in zip(part.rows, ids, strict=True)]
        found = PassResults(part.inputs, tensors)
        pairs = enumerate(zip(part.rows, ids, strict=True))
        return [step for place, (row, token) in pairs for step in self._steps(place, row, token, found)]

    def _step(self, row: PartRow, token: int) -> Step:
        """The result of a final row. Its failure ends its request only, and is not tried again: state has moved."""
        request, state = row.request, row.request.state
        try:
            if state.limit == 0 and (state.rows is None or state.rows.logprobs is None):
                return Step(request, finish={"type": "length", "length": 0})
            adjustment = request.state.adjustment
            if adjustment is not None and (failure := adjustment.account(token)) is not None:
                return Step(request, error=failure)
            if token < 0:
                return Step(request, finish=abort(NOT_FINITE, 500, "InternalServerError"))
            if state.limit == 0:  # the token was sampled for its log-probabilities
                return Step(request, finish={"type": "length", "length": 0})
            return Step(request, (token,), finish=finish_reason(request, token))
        except RequestError as error:
            return Step(request, error=error)
        except Exception:
            return failed(request)

    def _steps(self, place: int, row: PartRow, token: int, found: PassResults) -> list[Step]:
        """All results of a row in a pass of which some request wants more than a token."""
        request = row.request
        step = self._step(row, token) if row.final else Step(request)
        if request.state.rows is None or step.error is not None or (step.finish or {}).get("type") == "abort":
            return [step]
        try:
            results = found.of(place, row, token, step)
            request.state.rows.sent(row)
        except Exception:
            return [failed(request)]
        if not results:
            return [step] if row.final else []
        return [*(Step(request, data=data) for data in results[:-1]), replace(step, data=results[-1])]

    def probe(self) -> tuple[list[int], GenerationParams]:
        return [0], GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)


def failed(request: Request) -> Step:
    """The last step of a request whose failure is being handled."""
    log.exception("request %s failed after sampling", request.rid)
    return Step(request, error=RequestError(FAILED, status=500))


def abort(message: str, status: int | None = None, kind: str | None = None) -> dict[str, Any]:
    """A ``finish_reason`` of type abort."""
    return {"type": "abort", "message": message, "status_code": status, "err_type": kind}
