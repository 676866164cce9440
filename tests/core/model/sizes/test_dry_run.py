from __future__ import annotations

import torch

from trunkline.core.model.sizes.dry_run import peak_bytes


def empty(count: int) -> torch.Tensor:
    return torch.empty(count, device="meta")


def test_the_peak_is_of_what_is_alive_at_the_same_time() -> None:
    with peak_bytes() as measured:
        first = empty(100)
        second = first + 1
        del first
        third = second * 2
        del second, third
        empty(10)
    assert measured.peak == 800
    assert measured.alive == 0


def test_views_and_results_in_place_take_nothing() -> None:
    with peak_bytes() as measured:
        whole = empty(100)
        part = whole.view(10, 10)[3]
        del whole
        part.add_(1)
        assert measured.alive == 400  # a view keeps all of it
        del part
    assert (measured.peak, measured.alive) == (400, 0)


def test_what_was_there_before_does_not_count() -> None:
    weight = empty(100)
    with peak_bytes() as measured:
        view = weight.view(10, 10)
        result = view * 2
        assert measured.alive == 400
        del result
    assert measured.peak == 400
