"""Prepares models before they are loaded: resolves them, chooses their tasks, computes their memory demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from trunkline.core.errors import ModelError
from trunkline.core.host import Host
from trunkline.core.model import loader
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelInfo, ModelSource, Serves, Settings
from trunkline.kernels.cpu.processor import has_bfloat16

# Floating-point operations that a CPU does in less than a second; they determine the default chunk size.
PASS_FLOP = {torch.bfloat16: 3e11, torch.float32: 1.5e11}
CHUNKS = (32, 2048)  # smallest and largest default chunk size, tokens
SERVED_ALONE = "The model was launched for {alone} alone; add `--task {alone},{task}` to serve {task} too."


@dataclass(frozen=True)
class Candidate:
    """A model that will be loaded. ``refused``: for each task that it doesn't serve, the plugin's answer."""

    settings: ModelSettings
    source: ModelSource
    tokenizer_source: ModelSource
    info: ModelInfo
    tasks: list[str]
    refused: dict[str, Serves]
    plan: loader.ModelPlan

    @property
    def name(self) -> str:
        return self.settings.name

    @cached_property
    def pass_tokens(self) -> int | None:
        """Limit on the tokens of one pass, None = no limit."""
        return chunk_size(self.settings.chunked_prefill_size, self.plan.active_parameters, self.plan.dtype)


def examine(settings: ModelSettings, every: Settings, host: Host) -> Candidate:
    """Resolve one model and choose its tasks, without loading weights. ``every``: all settings, for hooks."""
    source = host.resolve_model(settings.reference)
    tokenizer_source = host.resolve_model(settings.tokenizer_path) if settings.tokenizer_path else source
    info = read_info(source, settings)
    tasks, refused = choose_tasks(settings, info, host.serves(info, every))
    return Candidate(settings, source, tokenizer_source, info, tasks, refused, loader.plan(source, info, settings))


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


def chunk_size(asked: int | None, parameters: int, dtype: torch.dtype) -> int | None:
    """Limit on the tokens of a pass. ``asked``: the user's, <= 0 means no limit (None); by default the power of two
    that a CPU computes in less than a second."""
    if asked is not None:
        return asked if asked > 0 else None
    flop = PASS_FLOP[torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16() else torch.float32]
    tokens = max(1, int(flop / (2 * max(parameters, 1))))
    return min(max(1 << (tokens.bit_length() - 1), CHUNKS[0]), CHUNKS[1])
