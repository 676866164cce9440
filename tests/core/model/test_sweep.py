"""Classes of transformers with tiny random weights, through the whole engine; see tests/sweep.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

SPARE = 20.0  # seconds that are left for the report


@pytest.mark.sweep
@pytest.mark.field
def test_each_class_is_equal_to_transformers_or_refused(
    suite: Any, load_script: Callable[[str], Any], tmp_path: Path
) -> None:
    """As many as the budget allows, in an order from the suite's seed; docs/architectures.md says the same."""
    sweep = load_script("tests/sweep.py")
    cases = sweep.cases()
    suite.random.shuffle(cases)
    known = sweep.known() if transformers.__version__ in sweep.TABLE.read_text(encoding="utf-8").splitlines()[0] else {}
    faults, tried = [], 0
    for case in cases:
        if suite.left < SPARE:
            break
        outcome = sweep.try_case(case, tmp_path / "checkpoint")
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        tried += 1
        page = known.get(case, outcome.status)
        if outcome.status in ("wrong", "broken") or (
            outcome.status != page and "unbuilt" not in (outcome.status, page)
        ):
            faults.append(f"{case.kind} {case.name}: {outcome.status} ({page} in the docs): {outcome.detail}")
    suite.notes.append(f"{tried} of {len(cases)} classes")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AlbertForSequenceClassification", "Qwen2Model"])
def test_the_sweep_sees_what_is_wrong(name: str, load_script: Callable[[str], Any], tmp_path: Path) -> None:
    """Seeded bug: the engine runs on other weights than the reference."""
    sweep = load_script("tests/sweep.py")
    case = next(case for case in sweep.cases() if case.name == name)
    assert sweep.try_case(case, tmp_path / "good").status == "served"
    reference = sweep.Reference

    def other(case: Any, folder: Path) -> Any:
        made = reference(case, folder)
        next(iter(made._loaded.parameters())).data.mul_(1.01)
        return made

    sweep.Reference = other
    assert sweep.try_case(case, tmp_path / "bad").status == "wrong"
