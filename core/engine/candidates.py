"""Prepares models before they are loaded: resolves them, chooses their tasks, computes their memory demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trunkline.core.discovery import Provided
from trunkline.core.errors import ModelError
from trunkline.core.host import Host
from trunkline.core.model.sizes.plan import ModelPlan, plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource, Serves, Settings, Transform
from trunkline.kernels.backend import Backend, choose, multiplies_bfloat16

# Floating-point operations that a CPU does in less than a second; they determine the default chunk size.
PASS_FLOP = {torch.bfloat16: 3e11, torch.float32: 1.5e11}
CHUNKS = (32, 2048)  # smallest and largest default chunk size on a CPU, tokens
# Default chunk sizes on GPUs by their memory, in bytes, which are SGLang's: the first for less than 35 GiB and so on.
GPU_CHUNKS = ((35 << 30, 2048), (60 << 30, 4096), (160 << 30, 8192))
LARGE_GPU_CHUNK = 16384
MAX_RUNNING = 256  # default limit on running requests; the size of the pool may lower it
SERVED_ALONE = "The model was launched for {alone} alone; add `--task {alone},{task}` to serve {task} too."


@dataclass(frozen=True)
class Candidate:
    """A model that will be loaded. ``refused``: for each task that it doesn't serve, the plugin's answer.

    ``default_chunk``: limit on the tokens of one pass, unless ``--chunked-prefill-size`` is given.
    """

    settings: ModelSettings
    source: ModelSource
    tokenizer_source: ModelSource
    info: ModelInfo
    tasks: list[str]
    refused: dict[str, Serves]
    plan: ModelPlan
    default_chunk: int
    backend: Backend
    transforms: Sequence[Provided[Transform]] = ()

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def pass_tokens(self) -> int | None:
        """Limit on the tokens of one pass, None = no limit."""
        asked = self.settings.chunked_prefill_size
        if asked is None:
            return self.default_chunk
        return asked if asked > 0 else None

    @property
    def running(self) -> int:
        """Limit on the requests that run at the same time."""
        return self.settings.max_running_requests or MAX_RUNNING


def examine(settings: ModelSettings, every: Settings, host: Host, device: torch.device, device_bytes: int) -> Candidate:
    """Resolve one model and choose its tasks, without loading weights. ``every``: all settings, for hooks.

    ``device``: where it will be computed. ``device_bytes``: all memory of this device.
    """
    source = host.resolve_model(settings.reference)
    tokenizer_source = host.resolve_model(settings.tokenizer_path) if settings.tokenizer_path else source
    info = read_info(source, settings)
    tasks, refused = choose_tasks(settings, info, host.serves(info, every))
    transforms = host.transforms(info, every)
    plan = plan_model(source, info, settings, device).stored_as([one.value for one in transforms])
    chunk = gpu_chunk(device_bytes) if device.type != "cpu" else cpu_chunk(plan.active_parameters, plan.dtype)
    widest = max((max(key, value) for _, key, value in plan.kv_shapes), default=0)
    backend = choose_backend(settings, device, widest)
    if plan.kv_shapes and settings.kv_cache_dtype == "int8" and not backend.int8_cache:
        raise ModelError(
            f"{settings.name} can't be served with --kv-cache-dtype int8: only the attention backend 'cpu' on a CPU "
            f"has it, not {backend.name!r} on {device.type!r}. Leave the option out, or give --device cpu "
            "--attention-backend cpu."
        )
    return Candidate(settings, source, tokenizer_source, info, tasks, refused, plan, chunk, backend, transforms)


def choose_backend(settings: ModelSettings, device: torch.device, widest_head: int) -> Backend:
    """The kernels of a model. ModelError where they have no deterministic mode, if that was asked for."""
    deterministic = settings.enable_deterministic_inference
    try:
        return choose(settings.attention_backend, device.type, widest_head, deterministic=deterministic)
    except ValueError as error:
        raise ModelError(
            f"{settings.name} can't be served with --enable-deterministic-inference: {error}. "
            "Leave the option out, or give --device cpu."
        ) from error


def choose_tasks(
    settings: ModelSettings, info: ModelInfo, answers: Mapping[str, Serves]
) -> tuple[list[str], dict[str, Serves]]:
    """The tasks to serve: those of ``--task``, else the checkpoint's defaults; and the answers for all others."""
    alone = [task for task, answer in answers.items() if answer.when == "alone"]
    defaults = alone or [task for task, answer in answers.items() if answer.when == "default"]
    if settings.task:
        for task in settings.task:
            if task not in answers:
                raise ModelError(f"No plugin serves the task {task!r}; there are: {', '.join(sorted(answers))}.")
            if answers[task].when == "no":
                raise ModelError(f"{settings.model_path} can't serve {task}: {answers[task].reason}")
        tasks = list(settings.task)
    else:
        tasks = defaults
    refused = {task: answer for task, answer in answers.items() if task not in tasks}
    for task, answer in refused.items():
        if answer.when == "default" and alone:
            refused[task] = Serves(task, "on_request", SERVED_ALONE.format(task=task, alone=",".join(alone)))
    if not tasks:
        reasons = " ".join(f"{task}: {answer.reason}" for task, answer in refused.items() if answer.reason)
        raise ModelError(
            f"No task can be served from {settings.model_path} ({info.architecture}). "
            f"{reasons or 'No plugin that is loaded serves any; `trunkline plugins list` shows them.'}"
        )
    return tasks, refused


def reasons(refused: Mapping[str, Serves], *, decodes: bool) -> dict[str, str]:
    """For each refused task, the sentence for clients. ``decodes``: whether a stage of the model does."""
    common = next((answer.common_reason for answer in refused.values() if answer.common_reason), "") if decodes else ""
    return {
        task: f"{common} {answer.detail}" if common and answer.detail else answer.reason
        for task, answer in refused.items()
    }


def cpu_chunk(parameters: int, dtype: torch.dtype) -> int:
    """The power of two of tokens that a CPU computes in less than a second, within ``CHUNKS``."""
    flop = PASS_FLOP[torch.bfloat16 if dtype == torch.bfloat16 and multiplies_bfloat16("cpu") else torch.float32]
    tokens = max(1, int(flop / (2 * max(parameters, 1))))
    return min(max(1 << (tokens.bit_length() - 1), CHUNKS[0]), CHUNKS[1])


def gpu_chunk(memory: int) -> int:
    """The default chunk size on a GPU with ``memory`` bytes, in tokens."""
    return next((chunk for limit, chunk in GPU_CHUNKS if memory < limit), LARGE_GPU_CHUNK)
