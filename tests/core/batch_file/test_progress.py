"""The progress of a run: rate, time left, failures."""

from __future__ import annotations

import io
from pathlib import Path

from trunkline.core.batch_file.answers import AnswerFile
from trunkline.core.batch_file.progress import RunRate, show_progress
from trunkline.core.batch_file.schemas import BatchAnswer, Response


def add(file: AnswerFile, count: int, status: int = 200) -> None:
    for _ in range(count):
        name = str(len(file))
        file.append(BatchAnswer(id="batch_req_", custom_id=name, response=Response(status, "", None)))


def test_rate_and_time_left_are_those_of_this_run(tmp_path: Path) -> None:
    clock = [100.0]
    with AnswerFile(tmp_path / "out") as file:
        add(file, 60)
        pace = RunRate(file, 8000, lambda: clock[0])
        assert str(pace) == "0.0/s"
        clock[0] += 20
        add(file, 40)
        assert (pace.rate, str(pace)) == (2.0, "2.0/s, 1:05:50 left")
        add(file, 1, 400)
        assert str(pace).endswith(" left, 1 failed")


def test_without_a_terminal_there_are_ten_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    with AnswerFile(tmp_path / "out") as file:
        add(file, 25)
        with show_progress(file, 100, stream) as report:
            for _ in range(75):
                add(file, 1)
                report()
    lines = stream.getvalue().splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"{count} of 100" for count in range(30, 101, 10)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    with AnswerFile(tmp_path / "out") as file, show_progress(file, 3, stream) as report:
        add(file, 2)
        report()
        add(file, 1, 500)
        report()
    assert "3/3" in stream.getvalue()
    assert "1 failed" in stream.getvalue()
