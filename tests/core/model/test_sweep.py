"""Classes of transformers with tiny random weights, through the whole engine; see tests/sweep.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

SPARE = 20.0  # seconds that are left for the report


def fault_of(outcome: Any, listed: str | None) -> str:
    """What is wrong with an outcome, "" for nothing.

    ``listed``: the status that docs/architectures.md gives, None for a class that isn't there. A class that it lists
    as served or refused must be built, unless a package is missing; one that it lists as unbuilt may be built.
    """
    if outcome.status == "unbuilt":
        bad = listed not in (None, "unbuilt") and not outcome.lacks_package
    else:
        bad = outcome.status in ("wrong", "broken") or listed not in (None, "unbuilt", outcome.status)
    shown = f"{outcome.case.kind} {outcome.case.name}: {outcome.status} ({listed} in the docs): {outcome.detail}"
    return shown if bad else ""


@pytest.mark.sweep
@pytest.mark.field
def test_each_class_is_equal_to_transformers_or_refused(
    suite: Any, load_script: Callable[[str], Any], tmp_path: Path
) -> None:
    """As many as the budget allows, in an order from the suite's seed; docs/architectures.md says the same."""
    sweep = load_script("tests/sweep.py")
    cases = sweep.cases()
    suite.random.shuffle(cases)
    listed = sweep.known()
    same_release = transformers.__version__ in sweep.TABLE.read_text(encoding="utf-8").splitlines()[0]
    faults, tried = [], 0
    for case in cases:
        if suite.left < SPARE:
            break
        outcome = sweep.try_case(case, tmp_path / "checkpoint")
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        tried += 1
        # With another release a class may be served or refused instead, but it can still be built.
        page = listed.get(case) if same_release or outcome.status == "unbuilt" else None
        faults.append(fault_of(outcome, page))
    suite.notes.append(f"{tried} of {len(cases)} classes")
    assert not any(faults), "\n".join(filter(None, faults))


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


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (ValueError("sizes that don't go together"), True),
        (ImportError("cannot import name 'CONTEXT'", name="trunkline.core.testing.tiny"), True),
        (ImportError("LlamaModel requires the detectron2 library but it was not found in your environment."), False),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), False),
    ],
)
def test_the_sweep_sees_a_class_that_is_no_longer_built(
    error: Exception, is_fault: bool, load_script: Callable[[str], Any], tmp_path: Path
) -> None:
    """Seeded bug: no tiny config can be made."""
    sweep = load_script("tests/sweep.py")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    sweep.tiny_config = fail
    listed = sweep.known()
    for name, status in (("LlamaForCausalLM", "served"), ("BloomForCausalLM", "refused")):
        case = next(case for case in sweep.cases() if case.name == name)
        outcome = sweep.try_case(case, tmp_path)
        assert (outcome.status, listed[case]) == ("unbuilt", status)
        assert (name in fault_of(outcome, listed[case])) is is_fault
        assert fault_of(outcome, "unbuilt") == ""
        assert fault_of(outcome, None) == ""


def test_an_outcome_that_the_docs_do_not_give_is_a_fault(load_script: Callable[[str], Any]) -> None:
    sweep = load_script("tests/sweep.py")
    case = sweep.Case("generation", "LlamaForCausalLM")
    for status in ("served", "refused", "wrong", "broken"):
        for listed in ("served", "refused", "unbuilt", None):
            good = status in ("served", "refused") and listed in (status, "unbuilt", None)
            assert (fault_of(sweep.Outcome(case, status, ""), listed) == "") is good
