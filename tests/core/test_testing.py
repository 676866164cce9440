"""The tiny checkpoints must be the same everywhere and must show a broken mask, position or bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trunkline.core.testing import ZOO, build_checkpoint


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_the_same_bytes_on_every_run(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    torch.rand(3)  # whatever was drawn before
    again = build_checkpoint(name, tmp_path / name)
    files = sorted(path.name for path in again.iterdir())
    assert files == sorted(path.name for path in zoo(name).iterdir())
    assert all((again / file).read_bytes() == (zoo(name) / file).read_bytes() for file in files)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_was_said_matters(name: str, zoo: Callable[[str], Path]) -> None:
    """Scores spread; the first token and the order of the others move the last position's scores."""
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(zoo(name), attn_implementation="eager").eval()
    ids = torch.randint(3, 512, (20,), generator=torch.Generator().manual_seed(1))
    other_start, other_order = ids.clone(), ids.clone()
    other_start[0] += 1
    other_order[12:18] = other_order[12:18].flip(0)
    with torch.inference_mode():
        scores, started, ordered = (whole(row[None]).logits[0, -1] for row in (ids, other_start, other_order))
    assert scores.std() > 1
    assert (scores - ordered).abs().max() > 0.1
    if name != "mistral-sliding":  # two layers with windows of 8 don't reach back to the first of 20
        assert (scores - started).abs().max() > 0.01
