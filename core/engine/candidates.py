"""Models before they are loaded: resolved, their tasks chosen, their memory demand known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from trunkline.core.config import ModelSettings
from trunkline.core.errors import ModelError
from trunkline.core.host import Host
from trunkline.core.model import loader
from trunkline.core.model.sources.info import read_info
from trunkline.core.types import ModelInfo, ModelSource
from trunkline.kernels.cpu.processor import has_bfloat16

from .memory import MAX_CONTEXTS, Demand

# What a CPU does in less than a second, by dtype: bounds the default chunk.
STEP_FLOP = {torch.bfloat16: 3e11, torch.float32: 1.5e11}
CHUNKS = (32, 2048)  # least and most tokens of the default chunk


@dataclass(frozen=True)
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

    @cached_property
    def pass_tokens(self) -> int | None:
        """The token budget of one pass, None for no limit."""
        return chunk_size(self.settings.chunked_prefill_size, self.plan.active_parameters, self.plan.dtype)


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
        pass_tokens=candidate.pass_tokens or MAX_CONTEXTS * candidate.info.context_length,
    )


def chunk_size(asked: int | None, parameters: int, dtype: torch.dtype) -> int | None:
    """Tokens per pass: the user's, with values <= 0 meaning whole prompts; by default what a CPU
    computes in less than a second, as a power of two."""
    if asked is not None:
        return asked if asked > 0 else None
    flop = STEP_FLOP[torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16() else torch.float32]
    tokens = max(1, int(flop / (2 * max(parameters, 1))))
    return min(max(1 << (tokens.bit_length() - 1), CHUNKS[0]), CHUNKS[1])
