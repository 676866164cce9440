"""Logits and greedy tokens against transformers, for every architecture of the zoo and each backend.

The same checkpoint in float32, eager attention: scores within 1e-4 and identical greedy tokens,
however a sequence is cut into passes, whatever shares the pass, wherever its slots lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import packed_layout, paged_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.testing import VOCABULARY, ZOO

TOLERANCE = 1e-4  # absolute, on scores that spread by about 3
LENGTHS = (5, 11, 40)
NEW_TOKENS = 24

# In Triton's interpreter all of the zoo takes minutes, so that most of it is in a suite.
TRITON = ("gpt-oss", "llama")
each = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for backend in ("torch_native", "cpu") for name in sorted(ZOO)]
    + [
        pytest.param(name, "triton", marks=[] if name in TRITON else pytest.mark.interpreter)
        for name in sorted(ZOO)
        if find_spec("triton")
    ],
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)  # with these, no step has two best scores closer than 1e-3
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


class Pages:
    """A pool with scattered slots, and passes over it: what the engine does, without the engine."""

    def __init__(self, model: LoadedModel, rows: int, room: int) -> None:
        self.model = model
        self.pool = KVPool(model.kv_shapes, rows * room, model.dtype, model.device)
        self.table = np.random.default_rng(3).permutation(rows * room).astype(np.int32).reshape(rows, room)

    def compute(self, sequences: Sequence[Sequence[int]], spans: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
        """Scores of the spanned positions by row; rows of one token come first, as in a batch."""
        rows = sorted(spans, key=lambda row: spans[row][1] - spans[row][0] != 1 or spans[row][0] == 0)
        bounds = [spans[row] for row in rows]
        ids = [token for row, (start, end) in zip(rows, bounds, strict=True) for token in sequences[row][start:end]]
        layout = paged_layout(self.table[rows], bounds)
        hidden = self.model.forward(
            torch.tensor(ids), torch.cat([torch.arange(*span) for span in bounds]), layout, self.pool
        )
        pieces = torch.split(hidden, [end - start for start, end in bounds])
        return {row: self.model.heads["scores"](piece) for row, piece in zip(rows, pieces, strict=True)}


@torch.inference_mode()
def alone(whole: Any, prompt: Sequence[int]) -> torch.Tensor:
    scores: torch.Tensor = whole(torch.tensor([prompt]), use_cache=False).logits[0]
    return scores


@each
def test_whole_sequences_packed(
    name: str, backend: str, load: Callable[..., LoadedModel], reference: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    model = load(name, backend)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = model.forward(ids, places, packed_layout(LENGTHS), None)
    for rows, prompt in zip(torch.split(hidden, LENGTHS), prompts, strict=True):
        assert (model.heads["scores"](rows) - alone(reference(name), prompt)).abs().max() < TOLERANCE


@each
@pytest.mark.parametrize("chunk", [40, 7])
def test_prefill_over_pages(
    name: str,
    backend: str,
    chunk: int,
    load: Callable[..., LoadedModel],
    reference: Callable[[str], Any],
    prompts: list[list[int]],
) -> None:
    """Whole prompts, then chunks of 7: later chunks of the long one share passes with nobody."""
    pages = Pages(load(name, backend), len(prompts), max(LENGTHS))
    scores: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(prompts))}
    for start in range(0, max(LENGTHS), chunk):
        spans = {row: (start, min(start + chunk, n)) for row, n in enumerate(LENGTHS) if start < n}
        for row, part in pages.compute(prompts, spans).items():
            scores[row].append(part)
    for row, prompt in enumerate(prompts):
        assert (torch.cat(scores[row]) - alone(reference(name), prompt)).abs().max() < TOLERANCE


@each
def test_greedy_tokens_in_mixed_batches(
    name: str, backend: str, load: Callable[..., LoadedModel], reference: Callable[[str], Any], prompts: list[list[int]]
) -> None:
    """The long prompt is computed in chunks while the short ones already decode."""
    model, whole = load(name, backend), reference(name)
    pages = Pages(model, len(prompts), max(LENGTHS) + NEW_TOKENS)
    sequences = [list(prompt) for prompt in prompts]
    computed = [0] * len(sequences)
    wanted = [len(prompt) + NEW_TOKENS for prompt in prompts]
    while any(len(sequence) < want for sequence, want in zip(sequences, wanted, strict=True)):
        spans = {
            row: (computed[row], min(computed[row] + 9, len(sequence)))
            for row, sequence in enumerate(sequences)
            if len(sequence) < wanted[row]
        }
        for row, scores in pages.compute(sequences, spans).items():
            computed[row] = spans[row][1]
            if computed[row] == len(sequences[row]):
                sequences[row].append(int(scores[-1].argmax()))
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence[len(prompt) :] == greedy(whole, prompt)


def greedy(whole: Any, prompt: list[int]) -> list[int]:
    """Tokens by transformers, computed from scratch each time; the choice must be a clear one."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        scores = alone(whole, tokens)[-1]
        best = scores.topk(2).values
        assert best[0] - best[1] > 1e-3, "a tie: the checkpoint is no test of greedy tokens"
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]
