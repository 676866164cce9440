"""Start-up of the engine, from settings to lanes: resolve, plan the memory of all models, load and warm up each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from trunkline.core.cache.pool import KVPool, SlotPool, SlotTable
from trunkline.core.cache.radix import RadixCache
from trunkline.core.config import Config
from trunkline.core.discovery import Provided
from trunkline.core.errors import ModelError
from trunkline.core.host import Host
from trunkline.core.model import loader
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sources.catalogue import cache_folder
from trunkline.core.model.sources.tokenizer import public_path
from trunkline.core.types import ServedModel, Settings, Stage, Tokenizer
from trunkline.kernels import compiled

from .candidates import Candidate, examine, reasons
from .contracts import CheckedStage
from .control.checked import CheckedControl
from .device.base import Device, Memory
from .device.choose import choose_device
from .lane import Lane
from .memory import MemoryPlan, MemoryShare, plan
from .messages import Loading, Ready
from .resources import set_threads
from .runner import Runner
from .scheduling.pace import Pace
from .scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    import torch

    from trunkline.core.model.sources.tensor_file import StoredTensor

log = logging.getLogger("trunkline.engine")

COMPILED_SECONDS = 0.1  # reading a compiled kernel takes less


@dataclass(slots=True)
class LoadedEngine:
    """The result of start-up: all that the engine loop and the front need."""

    lanes: list[Lane]
    controls: dict[str, Callable[..., Any]]
    ready: Ready  # the message to the front


def build(config: Config, host: Host, announce: Callable[[Loading], None]) -> LoadedEngine:
    """Load every model of the configuration. ``announce`` is called with a description of each phase.

    Raises ModelError when a model can't be found or served, or doesn't fit into memory.
    """
    device = choose_device(
        config.engine.device,
        overlaps=not config.engine.disable_overlap_schedule,
        graph_rows=0 if config.engine.disable_cuda_graph else config.engine.cuda_graph_max_bs,
    )
    compiled.keep_in(cache_folder() / "kernels")
    set_threads(config.engine.threads)
    clock = time.perf_counter()
    memory = plan_models(config, host, device.kind, device.memory())
    seconds = {"plan": time.perf_counter() - clock}
    for line in memory.lines():
        announce(Loading(line))
    if memory.problem:
        raise ModelError(memory.problem)
    lanes = []
    for candidate, grant in zip(memory.candidates, memory.shares, strict=True):
        announce(Loading(f"loading {candidate.name}"))
        with compiled.expected(lambda kernel, seconds: announce_kernel(kernel, seconds, announce)):
            clock = time.perf_counter()
            lane = load(candidate, grant, config.settings_of(candidate.settings), host, device)
            seconds[f"load {candidate.name}"] = time.perf_counter() - clock
            clock = time.perf_counter()
            warm_up(lane, announce)
            seconds[f"warm up {candidate.name}"] = time.perf_counter() - clock
        lanes.append(lane)
    controls: dict[str, Callable[..., Any]] = {}
    for name, provided in host.controls().items():
        controls[name] = CheckedControl(name, provided)
    return LoadedEngine(lanes, controls, Ready([lane.served for lane in lanes], memory.rows(), seconds))


def plan_models(config: Config, host: Host, device: torch.device, memory: Memory) -> MemoryPlan:
    """Plan the memory of all models of the configuration, without loading weights. ModelError for one that can't be
    found or served; whether they fit is the result's ``problem``."""
    engine = config.engine
    candidates = [examine(one, config.settings_of(one), host, device, memory.total) for one in config.models]
    return plan(candidates, device, memory, fraction=engine.mem_fraction_static, pool_bytes=engine.kv_cache_bytes)


def load(candidate: Candidate, grant: MemoryShare, settings: Settings, host: Host, device: Device) -> Lane:
    """Weights, heads, stages, pool and scheduler of one model."""
    if grant.context < candidate.info.context_length:
        holder = "the KV pool holds" if grant.kv_bytes else "--max-total-tokens allows"
        log.warning("%s: context reduced to %d tokens, all that %s", candidate.name, grant.context, holder)
    tokenizer = None if candidate.settings.skip_tokenizer_init else host.tokenizer(candidate.tokenizer_source)
    served, model, stages = assemble(candidate, grant, settings, host, device.kind, tokenizer)
    pool = KVPool(model.kv_shapes, grant.slots, model.kv_dtype, model.device) if grant.kv_bytes else None
    table = SlotTable(served.max_running_requests, grant.context)
    scheduler = schedule(candidate, served, pool, table, model.length_boundaries)
    runner = Runner(model, stages, pool, table, device, model.expert_watch)
    return Lane(served, model, stages, scheduler, runner, candidate=candidate, grant=grant)


def assemble(
    candidate: Candidate,
    grant: MemoryShare,
    settings: Settings,
    host: Host,
    device: torch.device,
    tokenizer: Tokenizer | None,
    weights: Iterable[tuple[str, torch.Tensor | StoredTensor]] | None = None,
    former: LoadedModel | None = None,
) -> tuple[ServedModel, LoadedModel, dict[str, CheckedStage]]:
    """The description of the model for the front, the model with its weights and heads, and its stages.

    ``weights``: tensors by name, by default the checkpoint's. ``former``: the served model that it will replace; its
    observers continue. Stages and observers are set here, after the model is loaded, since plugins make them from it.
    """
    own = candidate.settings
    heads = host.heads(candidate.info, settings, candidate.tasks)
    model = loader.load(
        candidate.source,
        candidate.info,
        own,
        heads,
        candidate.backend,
        name=candidate.name,
        tokenizer=tokenizer,
        max_request_tokens=grant.context,
        weights=host.weights(candidate.source) if weights is None else weights,
        transforms=candidate.transforms,
        device=device,
    )
    provided, refused = keep_stages(candidate, host.stages(model, settings, candidate.tasks), model)
    model.stages.update({task: one.value for task, one in provided.items()})
    if (watch := model.expert_watch) is not None and not watch.layers.unseen:
        known = None if former is None else former.expert_watch
        watch.provided = host.expert_observers(model, settings) if known is None else known.provided
    served = describe(candidate, grant, model, refused)
    return served, model, {task: CheckedStage(one, model.info.vocab_size) for task, one in provided.items()}


def keep_stages(
    candidate: Candidate, stages: Mapping[str, Provided[Stage]], model: LoadedModel
) -> tuple[dict[str, Provided[Stage]], dict[str, str]]:
    """The stages of active tasks whose heads were verified, and for each other task the reason why it is refused."""
    kept: dict[str, Provided[Stage]] = {}
    refused = {}
    for task in candidate.tasks:
        if task not in stages:
            refused[task] = f"The plugin of {task} has no stage for {candidate.info.architecture}."
            continue
        missing = [head for head in stages[task].value.heads if head not in model.heads]
        if missing:
            no_head = f"There is no head {missing[0]!r} for {candidate.info.architecture}."
            refused[task] = model.refused.get(missing[0], no_head)
        else:
            kept[task] = stages[task]
    if not kept:
        raise ModelError(f"{candidate.name} can't be served. {' '.join(refused[task] for task in candidate.tasks)}")
    decodes = any(stage.value.decodes for stage in kept.values())
    return kept, refused | reasons(candidate.refused, decodes=decodes)


def schedule(
    candidate: Candidate, served: ServedModel, pool: KVPool | None, table: SlotTable, boundaries: Sequence[int]
) -> Scheduler:
    """The scheduler of a model. Without a KV pool, it computes prompts whole and has no prefix cache."""
    own = candidate.settings
    return Scheduler(
        SlotPool(served.max_total_tokens),
        table,
        RadixCache() if pool is not None and not own.disable_radix_cache else None,
        chunk=candidate.pass_tokens if pool is not None else None,
        max_running=served.max_running_requests,
        policy=own.schedule_policy,
        boundaries=boundaries,
        pace=None if own.max_stall_ms == 0 else Pace(own.max_stall_ms and own.max_stall_ms / 1000),
    )


def describe(candidate: Candidate, grant: MemoryShare, model: LoadedModel, refused: dict[str, str]) -> ServedModel:
    """The description of a loaded model for the front."""
    own = candidate.settings
    info = msgspec.structs.replace(candidate.info, context_length=grant.context)
    return ServedModel(
        name=candidate.name,
        aliases=own.served_model_aliases,
        model_path=own.model_path,
        tokenizer_path=public_path(own.tokenizer_path or own.model_path, candidate.tokenizer_source),
        info=info,
        tasks={task: stage.decodes for task, stage in model.stages.items()},
        refused=refused,
        max_total_tokens=grant.slots,
        max_running_requests=min(candidate.running, grant.slots),  # each needs a slot
        chunked_prefill_size=candidate.pass_tokens or -1,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_cache_dtype=str(model.kv_dtype).removeprefix("torch.") if grant.kv_bytes else None,
        attention_backend=model.backend.name,
        deterministic=own.enable_deterministic_inference,
        device=str(model.device),
        weight_version=own.weight_version,
        fused=model.fused,
        stored_as=model.stored_as,
        skip_tokenizer_init=own.skip_tokenizer_init,
    )


def announce_kernel(kernel: str, seconds: float, announce: Callable[[Loading], None]) -> None:
    """Say that a kernel was compiled, unless it was only read from the folder of compiled kernels."""
    if seconds > COMPILED_SECONDS:
        announce(Loading(f"compiled the kernel {kernel} in {seconds:.1f} s"))


def warm_up(lane: Lane, announce: Callable[[Loading], None]) -> None:
    """Run what serving needs once: compiles kernels, captures graphs, and finds errors before clients do.

    Passes that compile are no measure of the time of later ones.
    """
    name, done, steps = lane.served.name, 0, len(lane.stages) + lane.runner.warm_up_steps

    def step() -> None:
        nonlocal done
        announce(Loading(f"warming up {name}", done, steps))
        done += 1

    for stage in lane.stages.values():
        step()
        for requests in stage.warm_up_batches():
            for request in requests:
                lane.admit(request)
            while (batch := lane.scheduler.plan()) is not None:
                for each in lane.finish(lane.start(batch)):
                    if each.error is not None:
                        raise ModelError(f"The warm-up of {name} failed: {each.error.message}")
    lane.runner.warm_up(name, step)
    lane.device_seconds = 0.0
    if lane.scheduler.pace is not None:
        lane.scheduler.pace.forget()
    announce(Loading(f"warming up {name}", steps, steps))
