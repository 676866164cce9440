"""Compilation is expected while models are loaded, and a defect afterwards."""

from __future__ import annotations

import logging

import pytest

from trunkline.kernels import compiled


def test_compilations_at_start_up_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    names: list[tuple[str, float]] = []
    with compiled.expected(lambda name, seconds: names.append((name, seconds))):
        compiled.note("attention", 0.5)
        compiled.note("norm", 0.1)
    assert names == [("attention", 0.5), ("norm", 0.1)]
    assert caplog.records == []


def test_a_compilation_while_serving_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with compiled.expected(lambda name, seconds: None):
        pass
    compiled.note("attention", 1.25)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "the kernel attention was compiled while serving: requests waited for 1.2 s" in record.message


def test_a_failed_start_expects_no_more(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no model"), compiled.expected(lambda name, seconds: None):
        raise ValueError("no model")
    compiled.note("norm", 0.0)
    assert len(caplog.records) == 1
