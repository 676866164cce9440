"""From scores to probabilities and names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trunkline.plugins.reward.labels import label_of, probabilities

SCORES = np.array([-2.0, 0.5, 3.0], dtype=np.float32)


def test_labels_that_exclude_each_other_share_one() -> None:
    wanted = torch.softmax(torch.from_numpy(SCORES), 0).numpy()
    np.testing.assert_allclose(probabilities({}, SCORES), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        probabilities({"problem_type": "single_label_classification"}, SCORES), wanted, rtol=1e-6
    )


@pytest.mark.parametrize("config", [{}, {"problem_type": "multi_label_classification"}])
def test_a_single_label_and_independent_ones_go_through_a_sigmoid(config: dict[str, str]) -> None:
    scores = SCORES if config else SCORES[:1]
    wanted = torch.sigmoid(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(probabilities(config, scores), wanted, rtol=1e-6)


def test_a_regression_stays_as_it_is() -> None:
    assert probabilities({"problem_type": "regression"}, SCORES) is SCORES


def test_large_scores_do_not_overflow() -> None:
    extreme = np.array([-1e4, 1e4], dtype=np.float32)
    with np.errstate(over="raise", invalid="raise"):
        assert probabilities({}, extreme).tolist() == [0.0, 1.0]
        assert probabilities({"problem_type": "multi_label_classification"}, extreme).tolist() == [0.0, 1.0]


def test_names_of_labels() -> None:
    assert label_of({"id2label": {"0": "bad", "1": "good"}}, 1) == "good"
    assert label_of({"id2label": {"0": "bad"}}, 1) == "LABEL_1"
    assert label_of({}, 0) == "LABEL_0"
