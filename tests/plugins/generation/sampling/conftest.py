"""A generation stage with an identity head, so that hidden rows are logits, and with any extensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.testing import run_stage
from trunkline.core.types import ModelInfo, Part, PartRow, Request, Step
from trunkline.kernels.adjust import adjust_cpu
from trunkline.kernels.sample import sample_cpu
from trunkline.plugins.generation.grammar.engines import choose_engine
from trunkline.plugins.generation.grammar.grammars import Grammars
from trunkline.plugins.generation.sampling.extensions import Extensions
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.stage import GenerationStage

VOCABULARY = 322  # of the fixture ``byte_level``
EOS = 321


class Driver:
    """Runs a stage token by token; ``seen`` has the adjusted logits of the last pass."""

    def __init__(self, tokenizer: Any = None, processors: Sequence[Any] = (), conditions: Sequence[Any] = ()) -> None:
        info = ModelInfo(
            path="",
            architecture="LlamaForCausalLM",
            model_type="llama",
            context_length=100,
            vocab_size=VOCABULARY,
            hidden_size=VOCABULARY,
            causal=True,
            eos_token_ids=(EOS,),
        )
        model: Any = SimpleNamespace(
            info=info, tokenizer=tokenizer, max_request_tokens=100, heads={"lm": lambda hidden: hidden}
        )
        plugin = Plugin("strange", "strange", distribution="strange-things", version="1.2")
        extensions = [[Provided(plugin, value) for value in values] for values in (processors, conditions)]
        self.seen = torch.empty(0)
        grammars = Grammars(model, choose_engine([], "none", model.info.vocab_size))
        self.stage = GenerationStage(model, self._sample, adjust_cpu, Extensions(*extensions), grammars)

    def _sample(self, logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        self.seen = logits.clone()
        return sample_cpu(logits, *parameters)

    def admit(self, prompt: Sequence[int] = (1, 2, 3), key: int = 1, **params: Any) -> Request:
        given = GenerationParams(**{"temperature": 0.0, "max_new_tokens": 50, **params})
        request = Request(key, f"r{key}", "generation", given, list(prompt), len(prompt))
        request.needs = self.stage.admit(request)
        return request

    def steps(self, *rows: tuple[Request, torch.Tensor]) -> list[Step]:
        """Run a pass with these logits for each request; returns its steps."""
        lengths = [len(request.tokens) for request, _ in rows]
        parts = [
            PartRow(request, n - 1, n, n - 1, n, index, True)
            for index, ((request, _), n) in enumerate(zip(rows, lengths, strict=True))
        ]
        part = Part("generation", parts)
        steps = run_stage(self.stage, part, torch.stack([logits for _, logits in rows]))
        for step in steps:
            step.request.tokens.extend(step.tokens)
        return steps

    def feed(self, request: Request, tokens: Sequence[int]) -> Step:
        """Sample these tokens one by one until the request ends; returns the last step."""
        for token in tokens:
            logits = torch.zeros(VOCABULARY)
            logits[token] = 1e6
            (step,) = self.steps((request, logits))
            if step.finish or step.error:
                break
        return step


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    return Driver
