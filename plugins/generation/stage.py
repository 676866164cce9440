"""The engine's part of generation: sample the next token of each row, decide when to stop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, PartRow, Request, Stage, Step
from trunkline.plugins.generation.sampling.adjust import Adjust, Adjuster
from trunkline.plugins.generation.sampling.extensions import FAILED, Extensions
from trunkline.plugins.generation.sampling.finish import finish_reason, start

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
        return Needs(new_tokens=limit, lockstep=adjustment is not None and adjustment.lockstep)

    def adopt(self, request: Request) -> Needs:
        """All that was counted goes on; which tokens end it, and who else has a say, is up to the new checkpoint."""
        request.state = start(request, self._model, self._eos, request.state.limit, self._extensions)
        return request.needs

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        if all(row.request.state.limit == 0 for row in part.rows):
            return Launched(torch.zeros(len(part.rows), dtype=torch.int64, device=hidden.device))
        if len(part.rows) != len(hidden):
            last = [row.offset + row.end - row.first - 1 for row in part.rows]
            hidden = hidden[torch.tensor(last, device=hidden.device)]
        logits = self._model.heads["lm"](hidden).float()
        self._adjust(part.rows, logits)
        position = torch.tensor([row.end for row in part.rows], device=hidden.device)
        temperature, top_k, top_p, min_p, seed = self._parameters(part, hidden.device)
        return Launched(self._sample(logits, temperature, top_k, top_p, min_p, seed, position))

    def _parameters(self, part: Part, device: torch.device) -> list[torch.Tensor]:
        """Temperature, top_k, top_p, min_p and seed, each ``[R]``; the same rows decode for many passes."""
        keys = [row.request.key for row in part.rows]
        if keys != self._batch[0]:
            params: list[GenerationParams] = [row.request.params for row in part.rows]
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
        return [self._step(row, token) for row, token in zip(part.rows, ids, strict=True)]

    def _step(self, row: PartRow, token: int) -> Step:
        """One row's result. Its failure ends its request only, and is not tried again: state has moved."""
        request = row.request
        try:
            if request.state.limit == 0:
                return Step(request, finish={"type": "length", "length": 0})
            adjustment = request.state.adjustment
            if adjustment is not None and (failure := adjustment.account(token)) is not None:
                return Step(request, error=failure)
            if token < 0:
                return Step(request, finish=abort(NOT_FINITE, 500, "InternalServerError"))
            return Step(request, (token,), finish=finish_reason(request, token))
        except RequestError as error:
            return Step(request, error=error)
        except Exception:
            log.exception("request %s failed after sampling", request.rid)
            return Step(request, error=RequestError(FAILED, status=500))

    def probe(self) -> tuple[list[int], GenerationParams]:
        return [0], GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)


def abort(message: str, status: int | None = None, kind: str | None = None) -> dict[str, Any]:
    """A ``finish_reason`` of type abort."""
    return {"type": "abort", "message": message, "status_code": status, "err_type": kind}
