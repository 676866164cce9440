"""Calls to stages in the engine: results are checked, and failures name the plugin.

The loop, the lanes and the runner call stages only through the class below. Every exception of a
plugin, SystemExit and KeyboardInterrupt included, becomes a PluginError, which ends one request. RequestErrors are
passed on: they are for the client.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from msgspec import Raw, Struct

from trunkline.core.discovery import Provided
from trunkline.core.errors import PluginError, RequestError, describe_error
from trunkline.core.types import MAX_FAILURES, SLOW_SECONDS, Launched, Needs, Part, Request, Stage, Step

from .checks import (
    are_tokens,
    encoded,
    is_sendable,
    problem_of_arrays,
    problem_of_launched,
    problem_of_needs,
    problem_of_new_needs,
    problem_of_step,
)
from .messages import FAILED

log = logging.getLogger("trunkline.engine")

MAX_STEPS = 1024  # limit on the steps of one row in one pass


class CheckedStage:
    """Calls a stage and checks its results. ``failures``: number of requests in a row that failed through it."""

    def __init__(self, provided: Provided[Stage], vocabulary: int) -> None:
        """``vocabulary``: size of the model's vocabulary, for checks of token ids."""
        self.stage = provided.value
        self.task = provided.value.task
        self.plugin = provided.plugin
        self.failures = 0
        self._provided = provided
        self._vocabulary = vocabulary
        self._params = msgspec.msgpack.Decoder(provided.value.params)
        self._warned: set[str] = set()

    # -- calls, in the order in which the engine makes them --------------------------------------

    def decode_params(self, raw: Raw) -> Struct:
        """A request's params. msgspec.ValidationError when they aren't those of the stage."""
        with guarded(self._raised, "params"):
            params: Struct = self._params.decode(raw)
        return params

    def before_admit(self, request: Request) -> Future[Any] | None:
        """What the request waits for before :meth:`admit`, or None. RequestError for the client; PluginError."""
        self._check_enabled()
        try:
            with guarded(self._raised, "before_admit"):
                future: Any = self.stage.before_admit(request)
            if future is not None and not isinstance(future, Future):
                raise self.fault("before_admit", f"returned {type(future).__name__}, not a concurrent.futures.Future")
        except PluginError:
            self.failures += 1
            raise
        return future

    def admit(self, request: Request) -> Needs:
        """The request's needs. RequestError for the client; PluginError."""
        self._check_enabled()
        began = time.perf_counter()
        try:
            with guarded(self._raised, "admit"):
                needs = self.stage.admit(request)
            self._time("admit", began)
            if problem := problem_of_needs(needs, request):
                self.release(request)
                raise self.fault("admit", f"returned {problem}")
        except PluginError:
            self.failures += 1
            raise
        return needs

    def adopt(self, request: Request) -> Needs:
        """What a request of the task's former stage needs from now on. RequestError for the client; PluginError."""
        with guarded(self._raised, "adopt"):
            needs = self.stage.adopt(request)
        if problem := problem_of_new_needs(needs, request):
            self.release(request)
            raise self.fault("adopt", f"returned {problem}")
        return needs

    def reset(self, request: Request) -> Needs:
        """The request's needs after a retraction. PluginError."""
        try:
            needs: Any = self.stage.reset(request)
        except BaseException as error:
            raise self._raised("reset", error) from error
        if needs is None:
            return request.needs
        if problem := problem_of_new_needs(needs, request):
            raise self.fault("reset", f"returned {problem}")
        return needs if isinstance(needs, Needs) else request.needs

    def prepare(self, part: Part) -> None:
        try:
            self.stage.prepare(part)
        except BaseException as error:
            raise self._raised("prepare", error) from error
        if problem := problem_of_arrays(part.arrays):
            raise self.fault("prepare", f"put {problem} into part.arrays")

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        try:
            launched = self.stage.launch(part, hidden)
        except BaseException as error:
            raise self._raised("launch", error) from error
        if problem := problem_of_launched(launched, len(part.rows)):
            raise self.fault("launch", f"returned {problem}")
        return launched

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> tuple[list[Step], PluginError | None]:
        """The part's steps in order, and the exception that ``collect`` raised, if any.

        An invalid step becomes the failure of its request; a value that belongs to no request of the part is logged
        and left out.
        """
        began = time.perf_counter()
        steps: list[Step] = []
        final = {id(row.request): row.final for row in part.rows}
        room = MAX_STEPS * len(part.rows)
        step: Any
        try:
            for step in self.stage.collect(part, tensors):
                room -= 1
                if room < 0:
                    return steps, self.fault("collect", f"gave more than {MAX_STEPS} steps per row")
                if not isinstance(step, Step):
                    log.error("%s", self.fault("collect", f"gave {type(step).__name__}, not Step"))
                elif id(step.request) not in final:
                    log.error("%s", self.fault("collect", "gave a step for a request that is not in the part"))
                elif problem := self._problem_of(step, final[id(step.request)]):
                    steps.append(self.fail(step.request, self.fault("collect", f"gave a wrong step: {problem}")))
                else:
                    steps.append(step)
        except BaseException as error:
            return steps, self._raised("collect", error)
        self._time("collect", began)
        return steps, None

    def probe(self, key: int) -> Request:
        """The stage's smallest request, for health checks. Such keys are negative."""
        try:
            prompt, params = self.stage.probe()
        except BaseException as error:
            raise self._raised("probe", error) from error
        return self._own_request("probe", key, prompt, params)

    def warm_up_batches(self) -> list[list[Request]]:
        """The requests that are run at start-up: one alone, then at least two together.

        A tensor with one token may have other strides, for which a kernel can have another variant.
        """
        try:
            given = [(prompt, params) for prompt, params in self.stage.warm_up()]
        except BaseException as error:
            raise self._raised("warm_up", error) from error
        if not given:
            raise self.fault("warm_up", "returned no request")
        batches = given[:1], given if len(given) > 1 else given * 2
        return [[self._own_request("warm_up", -1 - index, *one) for index, one in enumerate(each)] for each in batches]

    def _own_request(self, method: str, key: int, prompt: Sequence[int], params: Struct) -> Request:
        """A request of the engine's own. PluginError unless ids and params are valid."""
        try:
            ids = list(prompt)
        except TypeError:
            ids = []
        if not ids or not are_tokens(ids, self._vocabulary):
            raise self.fault(method, f"returned the prompt {prompt!r:.200}, not token ids")
        if not isinstance(params, self.stage.params):
            raise self.fault(method, f"returned {type(params).__name__}, not {self.stage.params.__name__}")
        return Request(
            key=key,
            rid="HEALTH_CHECK",
            task=self.task,
            params=params,
            tokens=ids,
            prompt_len=len(ids),
            cacheable=False,
        )

    def release(self, request: Request) -> None:
        """Never raises: the request has ended already."""
        try:
            self.stage.release(request)
        except BaseException as error:
            log.error("%s", self._raised("release", error), exc_info=error)

    def close(self) -> None:
        """Never raises: the stage isn't used any more."""
        try:
            self.stage.close()
        except BaseException as error:
            log.error("%s", self._raised("close", error), exc_info=error)

    def _check_enabled(self) -> None:
        """RequestError 503 if the task is switched off after too many failures."""
        if self.failures >= MAX_FAILURES:
            name = self.plugin.name
            raise RequestError(
                f"The task {self.task} is switched off: its plugin {name!r} ({self.plugin.origin}) failed "
                f"{self.failures} times in a row. POST /plugins/{name}/enable or a restart switches it on again.",
                status=503,
            )

    # -- failures --------------------------------------------------------------------------------

    def fault(self, method: str, what: str) -> PluginError:
        """The error that blames the task's plugin for what a method of its stage did."""
        return self._provided.failed(f"{method} of task {self.task!r} {what}")

    def fail(self, request: Request, error: PluginError) -> Step:
        """The last step of a request that fails through the plugin."""
        self.failures += 1
        return failed_step(request, error)

    def _raised(self, method: str, error: BaseException) -> PluginError:
        return self.fault(method, f"raised {describe_error(error)}")

    def _problem_of(self, step: Step, final: bool) -> str:
        """The text of an error in a step, "" if it is valid; then its data is encoded."""
        problem = problem_of_step(step, final, self._vocabulary)
        if not problem and step.data is not None:
            try:
                step.data = encoded(step.data, self.stage.result)
            except ValueError as error:
                return f"data must be a {self.stage.result.__name__}: {error}"
        return problem

    def _time(self, method: str, began: float) -> None:
        took = time.perf_counter() - began
        if took > SLOW_SECONDS and method not in self._warned:
            self._warned.add(method)
            log.warning("%s", self.fault(method, f"took {took:.2f} s, during which nothing else is served"))


@contextmanager
def guarded(fault: Callable[[str, BaseException], PluginError], method: str) -> Iterator[None]:
    """Turn the block's exceptions into PluginErrors, except RequestErrors and msgspec's errors about client values."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, msgspec.DecodeError) or is_sendable(error):
            raise
        raise fault(method, error) from error


def failed_step(request: Request, error: Exception) -> Step:
    """The last step of a request that fails in the engine. ``error`` is logged; the client gets a generic 500."""
    log.error("request %r of task %s fails: %s", request.rid, request.task, error, exc_info=error.__cause__)
    return Step(request, error=RequestError(FAILED, status=500))


def is_failure(step: Step) -> bool:
    """Whether the step ends its request because of a failure. Requests with non-finite numbers end as aborts."""
    return step.error is not None or (step.finish or {}).get("type") == "abort"


def enable(stages: Iterable[CheckedStage], plugin: str) -> list[str]:
    """Switch a plugin's tasks on again; their names. RequestError 404 for a plugin that serves none."""
    stages = list(stages)
    own = [stage for stage in stages if stage.plugin.name == plugin]
    if not own:
        names = ", ".join(sorted({stage.plugin.name for stage in stages}))
        raise RequestError(f"No task is served by a plugin named {plugin!r}; there are: {names}.", status=404)
    for stage in own:
        stage.failures = 0
    return sorted({stage.task for stage in own})
