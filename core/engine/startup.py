"""From settings to lanes: resolve, plan the memory of all models, then load them one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from trunkline.core.cache.pool import KVPool, SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.config import Config, ModelSettings
from trunkline.core.discovery import Provided
from trunkline.core.errors import ModelError
from trunkline.core.host import Host
from trunkline.core.model import loader
from trunkline.core.model.expert_watch import watch_experts
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sources.catalogue import cache_folder
from trunkline.core.model.sources.info import read_info
from trunkline.core.model.sources.tokenizer import public_path
from trunkline.core.types import ModelInfo, ModelSource, ServedModel, Stage, Tokenizer
from trunkline.kernels.backend import Backend, choose
from trunkline.kernels.cpu import objects
from trunkline.kernels.cpu.processor import has_bfloat16

from .contracts import CheckedControl, CheckedStage
from .lane import Lane
from .machine import available_bytes, set_threads
from .memory import WORTHWHILE, Demand, Grant, plan
from .runner import Runner
from .scheduler import Scheduler

log = logging.getLogger("trunkline.engine")

MAX_RUNNING = 256  # requests in a batch unless the user or the pool says less
# What a CPU does in less than a second, by dtype: bounds the default chunk.
STEP_FLOP = {torch.bfloat16: 3e11, torch.float32: 1.5e11}
CHUNKS = (32, 2048)  # least and most tokens of the default chunk


@dataclass(slots=True)
class Started:
    """What start-up hands to the loop and to the front."""

    lanes: list[Lane]
    controls: dict[str, Callable[..., Any]]
    plan: list[Grant]
    seconds: dict[str, float]
    builds: dict[Lane, Build] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Build:
    """What a lane keeps when its weights are updated: its memory, and the shapes that go with it."""

    plan: loader.ModelPlan
    grant: Grant
    pool: KVPool | None
    table: SlotTable


@dataclass(slots=True)
class Candidate:
    """A model that is decided on but not loaded."""

    name: str
    settings: ModelSettings
    source: ModelSource
    tokenizer_source: ModelSource
    info: ModelInfo
    tasks: list[str]
    refused: dict[str, str]
    plan: loader.ModelPlan


def build(config: Config, host: Host, announce: Callable[[str], None]) -> Started:
    """Load every model of the configuration. ``announce`` is told what is going on.

    Raises ModelError when a model can't be found, served or held in memory.
    """
    engine = config.engine
    objects.keep_in(cache_folder() / "kernels")
    set_threads(engine.threads)
    clock = time.perf_counter()
    candidates = [examine(settings, host) for settings in config.models]
    grants = plan(
        [demand(candidate) for candidate in candidates],
        available=available_bytes(),
        budget=engine.kv_cache_bytes,
    )
    seconds = {"plan": time.perf_counter() - clock}
    lanes = []
    builds = {}
    for candidate, grant in zip(candidates, grants, strict=True):
        announce(f"loading {candidate.name}")
        clock = time.perf_counter()
        lane, builds[lane] = load(candidate, grant, config.settings, host)
        seconds[f"load {candidate.name}"] = time.perf_counter() - clock
        clock = time.perf_counter()
        warm_up(lane)
        seconds[f"warm up {candidate.name}"] = time.perf_counter() - clock
        lanes.append(lane)
    controls: dict[str, Callable[..., Any]] = {}
    for name, provided in host.controls().items():
        controls[name] = CheckedControl(name, provided)
    return Started(lanes, controls, grants, seconds, builds)


def examine(settings: ModelSettings, host: Host) -> Candidate:
    """Resolve one model and decide its tasks, without loading anything heavy."""
    source = host.resolve_model(settings.reference)
    tokenizer_source = host.resolve_model(settings.tokenizer_path) if settings.tokenizer_path else source
    info = read_info(source, settings)
    tasks, refused = choose_tasks(settings, info, host)
    return Candidate(
        name=settings.name,
        settings=settings,
        source=source,
        tokenizer_source=tokenizer_source,
        info=info,
        tasks=tasks,
        refused=refused,
        plan=loader.plan(source, info, settings),
    )


def choose_tasks(settings: ModelSettings, info: ModelInfo, host: Host) -> tuple[list[str], dict[str, str]]:
    """The tasks to serve: those asked for with ``--task``, else the checkpoint's defaults."""
    answers = host.serves(info)
    if settings.task:
        for task in settings.task:
            if task not in answers:
                raise ModelError(f"No plugin serves the task {task!r}; there are: {', '.join(sorted(answers))}.")
            if answers[task].when == "no":
                raise ModelError(f"{settings.model_path} can't serve {task}: {answers[task].reason}")
        tasks = list(settings.task)
    else:
        tasks = [task for task, answer in answers.items() if answer.when == "default"]
    refused = {task: answer.reason for task, answer in answers.items() if task not in tasks}
    if not tasks:
        reasons = " ".join(f"{task}: {reason}" for task, reason in refused.items() if reason)
        raise ModelError(
            f"No task can be served from {settings.model_path} ({info.architecture}). "
            f"{reasons or 'No plugin that is loaded serves any; `trunkline plugins list` shows them.'}"
        )
    return tasks, refused


def demand(candidate: Candidate) -> Demand:
    return Demand(
        name=candidate.name,
        weight_bytes=candidate.plan.weight_bytes,
        token_bytes=candidate.plan.kv_bytes_per_token,
        context=candidate.info.context_length,
        tokens=candidate.settings.max_total_tokens,
        pass_tokens=pass_tokens(candidate) or WORTHWHILE * candidate.info.context_length,
    )


def pass_tokens(candidate: Candidate) -> int | None:
    """The token budget of one pass, None for no limit."""
    return chunk_size(candidate.settings.chunked_prefill_size, candidate.plan.active_parameters, candidate.plan.dtype)


def load(candidate: Candidate, grant: Grant, settings: Mapping[str, Any], host: Host) -> tuple[Lane, Build]:
    """Weights, heads, stages, pool and scheduler of one model."""
    if grant.context < candidate.info.context_length:
        holder = "the KV pool holds" if grant.kv_bytes else "--max-total-tokens allows"
        log.warning("%s: context reduced to %d tokens, all that %s", candidate.name, grant.context, holder)
    served, model, stages = assemble(candidate, grant, settings, host, host.tokenizer(candidate.tokenizer_source))
    watch = model.expert_watch
    if watch is not None and not watch.layers.unseen:
        watch.provided = host.expert_observers(model, settings)
    pool, table = memory(candidate, grant, model)
    scheduler = schedule(candidate, grant, pool, table, model.length_boundaries)
    runner = Runner(model, stages, pool, table, watch)
    lane = Lane(served, model, stages, scheduler, runner, settings=candidate.settings)
    return lane, Build(candidate.plan, grant, pool, table)


def assemble(
    candidate: Candidate, grant: Grant, settings: Mapping[str, Any], host: Host, tokenizer: Tokenizer | None
) -> tuple[ServedModel, LoadedModel, dict[str, CheckedStage]]:
    """What the front gets to know of the model, the model with its weights and heads, and its stages."""
    own = candidate.settings
    backend = choose(None if own.attention_backend == "auto" else own.attention_backend, "cpu")
    heads = host.heads(candidate.info, settings, candidate.tasks)
    model = loader.load(candidate.source, candidate.info, own, heads, backend, weights=host.weights(candidate.source))
    model.name = candidate.name
    model.tokenizer = tokenizer
    model.max_request_tokens = grant.context
    provided, refused = keep_stages(candidate, host.stages(model, settings, candidate.tasks), model)
    model.stages = {task: one.value for task, one in provided.items()}
    model.expert_watch = watch_experts(model)
    served = describe(candidate, grant, model, model.stages, refused, backend)
    return served, model, {task: CheckedStage(one, model.info.vocab_size) for task, one in provided.items()}


def keep_stages(
    candidate: Candidate, stages: Mapping[str, Provided[Stage]], model: LoadedModel
) -> tuple[dict[str, Provided[Stage]], dict[str, str]]:
    """The active tasks' stages whose heads were proven; what falls away is refused with its reason."""
    kept: dict[str, Provided[Stage]] = {}
    refused = dict(candidate.refused)
    for task in candidate.tasks:
        if task not in stages:
            refused[task] = f"The plugin of {task} has no stage for {candidate.info.architecture}."
            continue
        missing = [head for head in stages[task].value.heads if head not in model.heads]
        if missing:
            nobody = f"There is no head {missing[0]!r} for {candidate.info.architecture}."
            refused[task] = model.refused.get(missing[0], nobody)
        else:
            kept[task] = stages[task]
    if not kept:
        raise ModelError(f"{candidate.name} can't be served. {' '.join(refused[task] for task in candidate.tasks)}")
    return kept, refused


def memory(candidate: Candidate, grant: Grant, model: LoadedModel) -> tuple[KVPool | None, SlotTable]:
    """Room for keys and values, none for models that keep nothing, and who has which of it."""
    pool = KVPool(model.kv_shapes, grant.slots, model.dtype, model.device) if grant.kv_bytes else None
    return pool, SlotTable(max_running(candidate.settings, grant), grant.context)


def schedule(
    candidate: Candidate, grant: Grant, pool: KVPool | None, table: SlotTable, boundaries: Sequence[int]
) -> Scheduler:
    """A scheduler over that memory. Models that keep nothing get whole texts and no cache."""
    own = candidate.settings
    return Scheduler(
        SlotPool(grant.slots),
        table,
        RadixCache() if pool is not None and not own.disable_radix_cache else None,
        chunk=pass_tokens(candidate) if pool is not None else None,
        max_running=max_running(own, grant),
        policy=own.schedule_policy,
        boundaries=boundaries,
    )


def max_running(own: ModelSettings, grant: Grant) -> int:
    """Requests that may run at the same time; each needs a slot at least."""
    return min(own.max_running_requests or MAX_RUNNING, grant.slots)


def chunk_size(asked: int | None, parameters: int, dtype: torch.dtype) -> int | None:
    """Tokens per pass: the user's, with values <= 0 meaning whole prompts; by default what a CPU
    computes in less than a second, as a power of two."""
    if asked is not None:
        return asked if asked > 0 else None
    flop = STEP_FLOP[torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16() else torch.float32]
    tokens = max(1, int(flop / (2 * max(parameters, 1))))
    return min(max(1 << (tokens.bit_length() - 1), CHUNKS[0]), CHUNKS[1])


def describe(
    candidate: Candidate,
    grant: Grant,
    model: Any,
    stages: Mapping[str, Stage],
    refused: dict[str, str],
    backend: Backend,
) -> ServedModel:
    info = msgspec.structs.replace(candidate.info, context_length=grant.context)
    return ServedModel(
        name=candidate.name,
        aliases=candidate.settings.served_model_aliases,
        model_path=candidate.settings.model_path,
        tokenizer_path=public_path(
            candidate.settings.tokenizer_path or candidate.settings.model_path, candidate.tokenizer_source
        ),
        info=info,
        tasks={task: stage.decodes for task, stage in stages.items()},
        refused=refused,
        max_total_tokens=grant.slots,
        max_running_requests=max_running(candidate.settings, grant),
        chunked_prefill_size=pass_tokens(candidate) or -1,
        dtype=str(model.dtype).removeprefix("torch."),
        attention_backend=backend.name,
        weight_version=candidate.settings.weight_version,
        fused=model.fused,
    )


def warm_up(lane: Lane) -> None:
    """Run each stage's smallest request to its end: compiles kernels and proves the path."""
    for number, stage in enumerate(lane.stages.values()):
        request = stage.probe(key=-1 - number)
        lane.admit(request)
        while (batch := lane.schedule()) is not None:
            for step in lane.run(batch):
                if step.error is not None:
                    raise ModelError(f"The warm-up of {lane.served.name} failed: {step.error.message}")
    lane.spent = 0.0
