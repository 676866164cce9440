"""Files of answers: what is read of an earlier run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.core.batch_file.answers import AnswerFile
from trunkline.core.batch_file.schemas import BatchAnswer, LineError, Response
from trunkline.core.errors import ConfigError

RIGHT = BatchAnswer(id="batch_req_1", custom_id="a", response=Response(200, "r1", {"n": [1.5, None]}))
FAILED = BatchAnswer(id="batch_req_2", custom_id="b", response=Response(400, "r2", {"message": "no"}))
INVALID = BatchAnswer(id="batch_req_3", custom_id="a", error=LineError("duplicate_custom_id", "twice", 9))


def write(path: Path, *answers: BatchAnswer) -> bytes:
    with AnswerFile(path) as file:
        for answer in answers:
            file.append(answer)
    return path.read_bytes()


def test_lines_have_the_format_of_openais_batches(tmp_path: Path) -> None:
    first, second = write(tmp_path / "out", RIGHT, INVALID).splitlines()
    assert first == (
        b'{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"request_id":"r1","body":{"n":[1.5,null]}},'
        b'"error":null}'
    )
    assert second.endswith(b'"response":null,"error":{"code":"duplicate_custom_id","message":"twice","line":9}}')


def test_an_earlier_run_is_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "out", RIGHT, FAILED, INVALID)
    with AnswerFile(tmp_path / "out") as file:
        assert (file.answered, file.invalid, file.failed, len(file)) == ({"a", "b"}, {9}, 2, 3)
    assert (tmp_path / "out").read_bytes() == whole


def test_the_error_of_a_repeated_id_is_no_answer_to_its_first_use(tmp_path: Path) -> None:
    write(tmp_path / "out", INVALID)
    with AnswerFile(tmp_path / "out") as file:
        assert (file.answered, file.invalid) == (set(), {9})


@pytest.mark.parametrize("cut", [1, 5, 12, 40, 90])
def test_a_line_that_was_cut_off_is_removed(tmp_path: Path, cut: int) -> None:
    one = write(tmp_path / "one", RIGHT)
    whole = write(tmp_path / "out", RIGHT, FAILED)
    (tmp_path / "out").write_bytes(whole[: len(one) + cut])
    with AnswerFile(tmp_path / "out") as file:
        assert file.answered == {"a"}
        file.append(FAILED)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"important\n", b"important", b'{"custom_id": "a"}\n', b"{}", b"[1]\n", b"\xff\n", b"[" * 9999 + b"\n"]
)
@pytest.mark.parametrize("before", [(), (RIGHT,)])
def test_other_files_are_left_as_they_are(tmp_path: Path, content: bytes, before: tuple[BatchAnswer, ...]) -> None:
    path = tmp_path / "out"
    path.write_bytes(write(tmp_path / "before", *before) + content)
    whole = path.read_bytes()
    with pytest.raises(ConfigError, match=f"line {len(before) + 1}, isn't an answer"):
        AnswerFile(path)
    assert path.read_bytes() == whole


def test_a_file_that_cant_be_written_is_reported(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(ConfigError, match="Can't write answers to"):
            AnswerFile(path)
