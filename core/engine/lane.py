"""One served model in the engine: its stages, queue, cache and pool. The engine loop runs lanes in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trunkline.core.discovery import describe
from trunkline.core.errors import PluginError, RequestError
from trunkline.core.model.embeds import check_embeds
from trunkline.core.settings import ModelSettings
from trunkline.core.types import Request, ServedModel, Step

from .batch import Batch, Row, forward_passes
from .candidates import Candidate
from .contracts import CheckedStage, failed_step
from .memory import Grant
from .messages import Load
from .runner import Runner
from .scheduler import Scheduler

if TYPE_CHECKING:
    from trunkline.core.engine.control.pages import Saved

log = logging.getLogger("trunkline.engine")

EPOCH_BYTES = 4  # of a namespace; the rest is the request's salt


@dataclass(frozen=True, slots=True)
class Renewal:
    """Everything of a lane that a weight update replaces. ``sent``: the weights aren't those in a folder."""

    candidate: Candidate
    served: ServedModel
    model: Any
    stages: Mapping[str, CheckedStage]
    runner: Runner
    sent: bool = False


class Lane:
    """A model's requests, from admission to release.

    ``spent`` is the time in seconds, by ``clock``, that the lane's passes have taken; the loop compares
    it between lanes, to share the device evenly. ``epoch`` counts weight updates. ``note`` is called
    before each forward pass with the keys of its requests. ``candidate`` and ``grant`` are what it was
    loaded from and its memory, which weight updates need; ``settings`` those in force.
    ``sent``: its weights were sent and are in no folder, so an engine that is started again can't have them.
    ``paused``: nothing is scheduled until the front says continue. ``released``: memory that it has given back for
    the time being ("weights", "kv_cache"), without which nothing can be scheduled either; ``put_aside``: the
    contents of released weights.
    """

    def __init__(
        self,
        served: ServedModel,
        model: Any,
        stages: Mapping[str, CheckedStage],
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float] = time.perf_counter,
        candidate: Candidate | None = None,
        grant: Grant | None = None,
    ) -> None:
        self._clock = clock
        self.served = served
        self.model = model
        self.stages = stages
        self.scheduler = scheduler
        self.runner = runner
        self.candidate, self.grant = candidate, grant
        self.settings = candidate.settings if candidate is not None else ModelSettings(model_path=served.model_path)
        self.spent = 0.0
        self.epoch = 0
        self.sent = False
        self.paused = False
        self.released: frozenset[str] = frozenset()
        self.put_aside: Saved | None = None
        self.note: Callable[[Sequence[int]], None] = lambda keys: None

    def load(self, held: int = 0) -> Load:
        """The lane's load figures; ``held`` more requests wait for a weight update to end."""
        scheduler = self.scheduler
        return Load(
            self.served.name,
            scheduler.waiting + held,
            scheduler.running,
            scheduler.free_slots(),
            self.served.max_total_tokens,
        )

    @property
    def busy(self) -> bool:
        return self.scheduler.waiting + self.scheduler.running > 0

    @property
    def halted(self) -> bool:
        """Does it only collect requests for now?"""
        return self.paused or bool(self.released)

    def namespace(self, salt: bytes) -> bytes:
        """The part of the prefix cache that a request uses: separate for each epoch and salt."""
        return self.epoch.to_bytes(EPOCH_BYTES, "little") + salt

    def renew(self, new: Renewal) -> list[Step]:
        """Serve with new weights from now on, and drop everything that was computed with the old ones.

        Nothing may wait or run unless the lane is halted (AssertionError). Then running requests that have output go
        on with the keys of the old weights, and all others are computed from their beginning: no vector and no first
        token is of both. The steps are of requests that ended by it.
        """
        if self.busy and not self.halted:
            raise AssertionError(f"{self.served.name} still has requests of its old weights")
        steps = self.retract(lambda request: not request.output_len)
        requests = self.scheduler.renew(new.model.length_boundaries)
        former = self.stages
        self.candidate, self.settings = new.candidate, new.candidate.settings
        self.served, self.model = new.served, new.model
        self.stages, self.runner, self.sent = new.stages, new.runner, new.sent
        self.released, self.put_aside = self.released - {"weights"}, None  # the new model has its own
        self.epoch += 1
        return steps + [step for request in requests for step in self._adopt(request, former[request.task])]

    def _adopt(self, request: Request, former: CheckedStage) -> list[Step]:
        """Hand a request over to its task's new stage; the failed step, if that won't have it."""
        stage = self.stages[request.task]
        request.namespace = self.namespace(request.namespace[EPOCH_BYTES:])
        former.release(request)
        try:
            request.needs = stage.adopt(request)
        except Exception as error:
            self.scheduler.finish(request)  # nothing to release: it was never admitted
            if isinstance(error, RequestError):
                return [Step(request, error=error)]
            return [stage.fail(request, error) if isinstance(error, PluginError) else failed_step(request, error)]
        return []

    def flush(self) -> bool:
        """Forget all cached prefixes; False when a request is in the way. Those that wait in a pause aren't."""
        return self.scheduler.flush(paused=self.halted)

    def retract(self, chosen: Callable[[Request], bool] = lambda request: True) -> list[Step]:
        """Queue running requests again, to be computed anew. The steps are of those that ended by it."""
        return [
            done
            for request in self.scheduler.retract(chosen)
            for step in self._reset(request)
            for done in self._apply(step)
        ]

    def admit(self, request: Request) -> None:
        """Validate and queue a request. RequestError if it can't be served, PluginError if its stage fails."""
        stage = self.stages.get(request.task)
        if stage is None:
            raise RequestError(self.served.refused.get(request.task, f"{self.served.name} doesn't serve this task."))
        self._check_ids(request)
        if request.embeds is not None:
            check_embeds(self.model, request.embeds)
        if request.second_at is not None and self.model.token_types:
            request.cacheable = False  # the cache key has token ids but no token types
        request.needs = stage.admit(request)
        try:
            self._check_length(request)
            self.scheduler.add(request)
        except Exception:
            stage.release(request)
            raise

    def _check_ids(self, request: Request) -> None:
        """RequestError for ids outside the embedding table."""
        vocabulary = self.served.info.vocab_size
        if request.tokens and (min(request.tokens) < 0 or max(request.tokens) >= vocabulary):
            raise RequestError(f"The input_ids contains values outside the vocabulary; ids lie in [0, {vocabulary}).")

    def _check_length(self, request: Request) -> None:
        limit = self.served.max_request_tokens
        total = len(request.tokens) + request.needs.new_tokens
        if not request.tokens:
            raise RequestError("The prompt has no tokens; at least one is needed.")
        if total > limit:
            raise RequestError(
                f"The request needs {total} tokens ({len(request.tokens)} of input and up to "
                f"{request.needs.new_tokens} new), but {self.served.name} holds at most {limit} per request. "
                "Shorten the input or lower the number of new tokens."
            )

    def schedule(self) -> Batch | None:
        """The batch to compute next; None when no request waits or runs."""
        return self.scheduler.plan()

    def run(self, batch: Batch) -> list[Step]:
        """Compute a batch and apply its steps to their requests. Requests that ended are removed."""
        began = self._clock()
        resets = [step for request in batch.retracted for step in self._reset(request)]
        steps = [step for rows in forward_passes(batch.rows) for step in self._compute(rows)]
        # Keys and values of a failed request may be wrong, so they must not reach the prefix cache.
        failed_keys = {step.request.key for step in steps if failed_with(step)}
        self.scheduler.commit(batch.without(failed_keys) if failed_keys else batch)
        applied = [done for step in (*resets, *steps) for done in self._apply(step)]
        # A final row without a step: its request would never make progress.
        stalled = [
            row.request for row in batch.rows if self.scheduler.holds(row.request) and not row.request.extend_len
        ]
        for request in stalled:
            applied += self._apply(self._fault(request, "gave no step for the request's last token"))
        self.spent += self._clock() - began
        return applied

    def _apply(self, step: Step) -> list[Step]:
        """Apply a step to its request. Returns it, or what replaces it if the stage broke its contract."""
        request = step.request
        stage = self.stages[request.task]
        if not self.scheduler.holds(request):
            log.error("%s", stage.fault("collect", f"gave a step for request {request.rid!r}, which had ended"))
            return []
        if request.output_len + len(step.tokens) > request.needs.new_tokens:
            step = self._fault(request, f"gave more than the {request.needs.new_tokens} tokens that it announced")
        request.tokens.extend(step.tokens)
        if step.finish is not None:
            stage.failures = 0
        if step.finish is not None or step.error is not None:
            self.end(request)
        return [step]

    def _fault(self, request: Request, what: str) -> Step:
        """The failed step of a request whose stage's ``collect`` broke its contract."""
        stage = self.stages[request.task]
        return stage.fail(request, stage.fault("collect", what))

    def _reset(self, request: Request) -> list[Step]:
        """Tell the stage that a request was retracted. Returns the failed step if that raises."""
        stage = self.stages[request.task]
        try:
            request.needs = stage.reset(request)
        except PluginError as error:
            return [stage.fail(request, error)]
        return []

    def end(self, request: Request) -> None:
        """Remove a request that finished, failed or was aborted. Does nothing if it is already removed."""
        if not self.scheduler.holds(request):
            return
        self.scheduler.finish(request)
        self.stages[request.task].release(request)

    def _compute(self, rows: Sequence[Row]) -> list[Step]:
        """Run rows together. Those that fail are run once more, each alone; a second failure ends the request."""
        steps, failed = self._attempt(rows)
        for row, _ in failed:
            more, again = self._attempt([row])
            steps += more
            steps += [self._failed(row.request, error) for _, error in again]
        return steps

    def _failed(self, request: Request, error: Exception) -> Step:
        if isinstance(error, PluginError):
            return self.stages[request.task].fail(request, error)
        return failed_step(request, error)

    def _attempt(self, rows: Sequence[Row]) -> tuple[list[Step], list[tuple[Row, Exception]]]:
        """Run rows together. Returns their steps, and the rows that failed."""
        self.note([row.request.key for row in rows])
        try:
            parts = self.runner.run(rows)
        except Exception as error:
            log.warning("a pass over %d rows failed: %s", len(rows), describe(error), exc_info=error)
            return [], [(row, error) for row in rows]
        steps: list[Step] = []
        errors: dict[int, Exception] = {}
        for part, tensors in parts:
            own, problem = self.stages[part.task].collect(part, tensors)
            steps += own
            if problem is not None:
                done = {step.request.key for step in own}
                errors |= {row.request.key: problem for row in part.rows if row.request.key not in done}
        return steps, [(row, errors[row.request.key]) for row in rows if row.request.key in errors]


def failed_with(step: Step) -> bool:
    """Whether the step ends its request because of a failure; rows with non-finite numbers end as aborts."""
    return step.error is not None or (step.finish or {}).get("type") == "abort"
