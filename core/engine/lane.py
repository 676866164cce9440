"""``Lane``: one served model in the engine, with its stages, queue, cache and pool. The engine loop calls it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trunkline.core.errors import PluginError, RequestError
from trunkline.core.model.embeds import check_embeds
from trunkline.core.settings import ModelSettings
from trunkline.core.types import Request, ServedModel, Step

from .candidates import Candidate
from .contracts import CheckedStage, failed_step, is_failure
from .flight import Attempt, BatchInFlight
from .memory import MemoryShare
from .messages import Load
from .runner import Runner
from .scheduling.batch import Batch
from .scheduling.row import Row
from .scheduling.scheduler import Scheduler
from .weight_update import WeightUpdate

if TYPE_CHECKING:
    from trunkline.core.engine.control.pages import SavedPages

log = logging.getLogger("trunkline.engine")

EPOCH_BYTES = 4  # at the start of a namespace; the rest is the request's salt


class Lane:
    """Serves a model's requests from admission to release. Only the engine loop's thread may use it.

    * ``device_seconds``: the time that its passes have taken, by ``clock``. The loop compares it between lanes, to
      share the device evenly.
    * ``finished_at``: when its last batch was collected, by ``clock``.
    * ``epoch``: number of weight updates.
    * ``note``: called before each forward pass with the keys of its requests.
    * ``candidate``, ``grant``: what the model was loaded from, and its memory; weight updates need both.
    * ``settings``: the model's settings in force, with which a restarted engine serves it.
    * ``paused``: nothing is scheduled until the control ``continue``.
    * ``released``: memory that is released at present ("weights", "kv_cache"); meanwhile nothing is scheduled.
    * ``saved_weights``: the contents of released weights.
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
        grant: MemoryShare | None = None,
    ) -> None:
        self._clock = clock
        self._ending: list[Request] = []  # have ended, but a batch in flight has rows of them
        self.served = served
        self.model = model
        self.stages = stages
        self.scheduler = scheduler
        self.runner = runner
        self.candidate, self.grant = candidate, grant
        self.settings = candidate.settings if candidate is not None else ModelSettings(model_path=served.model_path)
        self.device_seconds = self.finished_at = 0.0
        self.epoch = 0
        self.paused = False
        self.released: frozenset[str] = frozenset()
        self.saved_weights: SavedPages | None = None
        self.note: Callable[[Sequence[int]], None] = lambda keys: None

    def current_load(self, deferred: int = 0) -> Load:
        """The lane's load; ``deferred`` more requests wait for a weight update. May be called from any thread."""
        scheduler = self.scheduler
        return Load(
            self.served.name,
            scheduler.waiting + deferred,
            scheduler.running,
            scheduler.queue.retracted,
            scheduler.free_slots(),
            self.served.max_total_tokens,
            scheduler.queue.tokens,
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.waiting + self.scheduler.running > 0

    @property
    def overlaps(self) -> bool:
        """Whether a batch runs on while the host prepares the next one."""
        return self.runner.device.overlaps

    @property
    def halted(self) -> bool:
        """Whether requests only wait for now: the lane is paused, or some of its memory is released."""
        return self.paused or bool(self.released)

    def namespace(self, salt: bytes) -> bytes:
        """The part of the prefix cache that a request uses: separate for each epoch and salt."""
        return self.epoch.to_bytes(EPOCH_BYTES, "little") + salt

    def apply_update(self, update: WeightUpdate) -> list[Step]:
        """Serve with new weights from now on. The cache is emptied. Returns the steps of requests that fail by it.

        AssertionError while requests wait or run, unless the lane is halted. In a halted lane, running requests with
        output continue with the keys and values of the old weights; all others are computed from their beginning. So
        no vector and no first token is computed with both.
        """
        if self.busy and not self.halted:
            raise AssertionError(f"{self.served.name} still has requests of its old weights")
        steps = self.retract(lambda request: not request.output_len)
        requests = self.scheduler.start_epoch(update.model.length_boundaries)
        old_stages = self.stages
        self.candidate, self.settings = update.candidate, update.candidate.settings
        self.served, self.model = update.served, update.model
        self.stages, self.runner = update.stages, update.runner
        self.released, self.saved_weights = self.released - {"weights"}, None  # the new model has its own memory
        self.epoch += 1
        steps += [step for request in requests for step in self._adopt(request, old_stages[request.task])]
        for stage in old_stages.values():
            stage.close()
        return steps

    def _adopt(self, request: Request, old_stage: CheckedStage) -> list[Step]:
        """Transfer a request to its task's new stage. Returns the failed step if that refuses it."""
        stage = self.stages[request.task]
        request.namespace = self.namespace(request.namespace[EPOCH_BYTES:])
        old_stage.release(request)
        try:
            request.needs = stage.adopt(request)
        except Exception as error:
            self.scheduler.finish(request)  # without ``stage.release``: the new stage hasn't adopted it
            if isinstance(error, RequestError):
                return [Step(request, error=error)]
            return [self._failed(request, error)]
        return []

    def flush(self) -> bool:
        """Empty the prefix cache. False, and nothing is emptied, while a request runs.

        In a lane that isn't halted, also while one waits.
        """
        return self.scheduler.flush(paused=self.halted)

    def retract(self, selects: Callable[[Request], bool] = lambda request: True) -> list[Step]:
        """Queue the selected running requests again, for recomputation. Returns the steps of those that fail by it."""
        return [
            applied
            for request in self.scheduler.retract(selects)
            for step in self._reset(request)
            for applied in self._apply(step)
        ]

    def admit(self, request: Request) -> None:
        """Check a request and queue it. RequestError if it can't be served, PluginError if its stage fails."""
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
        """RequestError for a request without tokens, or with more than fit into the context or the pool."""
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

    def start(self, batch: Batch, previous: BatchInFlight | None = None) -> BatchInFlight:
        """Start to compute a batch; ``previous``: the batch of this lane that is in flight."""
        began = self._clock()
        resets = [step for request in batch.retracted for step in self._reset(request)]
        flight = BatchInFlight(batch, began, resets)
        flight.start(self.runner, self.note, previous)
        return flight

    def finish(
        self, flight: BatchInFlight, following: BatchInFlight | None = None, *, after: float = 0.0
    ) -> list[Step]:
        """Collect a batch and apply its steps to their requests. Requests that ended are removed.

        ``following``: the next batch of this lane, which is in flight. A failure cancels it. ``after``: when the batch
        before it was collected, of any lane, by the clock: the device had not begun with this one.
        """
        ending, self._ending = self._ending, []  # requests that ended after the batch was started
        device = self.runner.device
        collected = [attempt.collect(self.stages, device) for attempt in flight.attempts]
        failures = [failure for _, failed in collected for failure in failed]
        if failures and following is not None:
            following.cancel()
            self.scheduler.cancel(following.batch)  # its tokens are planned again
        steps = [step for attempt_steps, _ in collected for step in attempt_steps]
        for row in (row for row, _ in failures if self.scheduler.holds(row.request)):
            steps += self._retry(row)
        steps = [step for step in steps if not any(step.request is request for request in ending)]
        postponed = {step.request.key for step in steps if step.postponed}
        computed, again = flight.batch.postpone(postponed)
        self.scheduler.cancel(again)
        # Keys and values of a failed request may be wrong, so they must not reach the prefix cache.
        self.scheduler.commit(computed, {step.request.key for step in steps if is_failure(step)})
        applied = [done for step in (*flight.resets, *steps) if not step.postponed for done in self._apply(step)]
        # A final row without a step: its request would never make progress.
        moved = postponed.union(step.request.key for step in steps if step.tokens)
        for row in flight.batch.rows:
            if row.final and row.request.key not in moved and self.scheduler.holds(row.request):
                applied += self._apply(self._fault(row.request, "gave no step for the request's last token"))
        for request in ending:
            self.stages[request.task].release(request)
        self.finished_at = self._clock()
        seconds = self.finished_at - max(flight.began, after)
        self.device_seconds += seconds
        if (pace := self.scheduler.pace) is not None:
            decodes, tokens = flight.batch.decodes, flight.batch.tokens
            pace.observe(decodes, tokens - decodes, seconds)
        return applied

    def _retry(self, row: Row) -> list[Step]:
        """Compute a row that failed once more, alone; a second failure ends its request."""
        self.note([row.request.key])
        row.source = -1  # its input is known by now
        steps, failed = Attempt.start([row], self.runner).collect(self.stages, self.runner.device)
        return steps + [self._failed(row.request, error) for _, error in failed]

    def _apply(self, step: Step) -> list[Step]:
        """Apply a step to its request. Returns it, or the failed step if the stage broke its contract.

        [] for a step of a request that has ended.
        """
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
        if self.scheduler.finish(request):
            self.stages[request.task].release(request)
        else:
            self._ending.append(request)

    def _failed(self, request: Request, error: Exception) -> Step:
        """The failed step of a request, counted as a failure of its stage if a plugin caused it."""
        if isinstance(error, PluginError):
            return self.stages[request.task].fail(request, error)
        return failed_step(request, error)
