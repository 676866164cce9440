"""Every check of the checked interpreter finds its seeded bug, which the plain interpreter lets pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import seeded_access as access
from . import seeded_values as values
from .checked import Checks, KernelBug, checked

BUGS: dict[Callable[[bool], bool], str] = {
    access.store_without_mask: "bounds",
    access.load_one_after_the_end: "bounds",
    access.load_one_before_the_start: "bounds",
    access.load_through_another_tensor: "bounds",
    access.load_between_the_elements_of_a_view: "bounds",
    access.misaligned_load: "alignment",
    access.int32_offset_into_a_large_pool: "overflow",
    access.int32_overflow_of_a_loop_variable: "overflow",
    access.int32_overflow_of_a_python_loop_variable: "overflow",
    access.narrowing_of_a_large_offset: "overflow",
    values.sum_of_undefined_lanes: "poison",
    values.values_outside_of_the_window: "poison",
    values.address_from_undefined_slots: "poison",
    values.branch_on_an_undefined_value: "poison",
    values.two_programs_store_one_element: "race",
    values.one_program_reads_what_another_stores: "race",
    values.lanes_store_one_element: "race",
    values.counting_without_atomics: "race",
    values.failed_assertion: "assert",
    values.wrong_divisibility: "claim",
    values.wrong_contiguity: "claim",
}
every_bug = pytest.mark.parametrize(("run", "kind"), BUGS.items(), ids=lambda part: getattr(part, "__name__", ""))


@every_bug
def test_the_bug_is_found(run: Callable[[bool], bool], kind: str) -> None:
    with checked(), pytest.raises(KernelBug) as caught:
        run(True)
    assert caught.value.kind == kind


@every_bug
def test_the_kernel_without_the_bug_passes(run: Callable[[bool], bool], kind: str) -> None:
    with checked():
        assert run(False)


@every_bug
def test_the_plain_interpreter_does_not_find_it(run: Callable[[bool], bool], kind: str) -> None:
    """Nothing is raised, and the numbers are those that a kernel without the bug gives, or none to compare with."""
    assert run(True)


@pytest.mark.parametrize(
    ("run", "checks"),
    [
        (access.load_one_after_the_end, Checks(bounds=False)),
        (access.int32_overflow_of_a_loop_variable, Checks(overflow=False)),
        (values.sum_of_undefined_lanes, Checks(poison=False)),
        (values.one_program_reads_what_another_stores, Checks(races=False)),
    ],
)
def test_a_check_can_be_turned_off(run: Callable[[bool], bool], checks: Checks) -> None:
    with checked(checks, order="forward"):
        assert run(True)
