"""``trunkline batch``: its arguments, and whole runs in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trunkline.core import cli
from trunkline.core.commands.batch import split_last, with_defaults
from trunkline.core.commands.serve import StartupSelection

SCRIPT = "from trunkline.core.cli import main; main()"


@pytest.mark.parametrize(
    ("args", "rest", "last"),
    [
        (["model", "in"], ["model"], "in"),
        (["in"], [], "in"),
        (["model", "in", "-o", "out"], ["model", "-o", "out"], "in"),
        (["-o", "out", "--flag", "model", "--flag", "in"], ["-o", "out", "--flag", "model", "--flag"], "in"),
        (["in", "--output=out"], ["--output=out"], "in"),
        (["-o", "out"], ["-o", "out"], None),
        (["a", "b", "in", "-o"], ["a", "b", "-o"], "in"),
        ([], [], None),
    ],
)
def test_the_file_of_requests_is_the_last_argument(args: list[str], rest: list[str], last: str | None) -> None:
    assert split_last(args, {"-o", "--output"}) == (rest, last)


def test_the_defaults_give_way_to_the_configuration_file() -> None:
    given: dict[str, Any] = {"settings": {"server": {"log_level": "debug"}, "engine": {"threads": 1}}, "models": []}
    data = with_defaults(StartupSelection(given)).data
    assert data["settings"]["server"]["log_level"] == "debug"
    assert data["settings"]["server"]["max_queued_requests"] > 1 << 20
    assert (data["settings"]["engine"], data["models"]) == ({"threads": 1}, [])
    assert with_defaults(StartupSelection()).data["settings"]["server"]["log_level"] == "warning"


def test_mistakes_are_reported_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.write_text('{"custom_id": "a"}\n')
    for args, words in (
        ([str(source)], "Give a file of requests and one for answers"),
        (["-o", "out"], "Give a file of requests and one for answers"),
        (["no-model", str(tmp_path / "none"), "-o", str(tmp_path / "out")], "Can't read the requests"),
        (["no-model", str(source), "-o", str(source)], "is the file of requests"),
        (["no-model", str(source), "-o", str(tmp_path)], "Can't write answers"),
        (["no-model", str(source), "-o", "x", "--concurrency", "0"], "--concurrency must be from 1"),
    ):
        assert cli.run(["batch", *args]) == 2, words
        assert words in capsys.readouterr().err
    assert source.read_text() == '{"custom_id": "a"}\n'
    assert not (tmp_path / "out").exists()


def write(path: Path, lines: list[tuple[str, str, dict[str, Any]]]) -> Path:
    path.write_text(
        "".join(
            json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n"
            for name, url, body in lines
        )
    )
    return path


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, "batch", "--dtype", "float32", "--threads", "1", *args]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read(path: Path) -> dict[str, Any]:
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({answer["custom_id"] for answer in answers}) == len(answers)
    return {answer["custom_id"]: answer["response"] for answer in answers}


@pytest.fixture
def third_party(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started later find the plugin of ``examples/trunkline-surprise``, as if it were installed."""
    metadata = tmp_path / "site" / "trunkline_surprise-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trunkline-surprise\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[trunkline]\nsurprise = trunkline_surprise\n")
    folders = [str(tmp_path / "site"), str(repository / "examples" / "trunkline-surprise")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


@pytest.mark.usefixtures("third_party")
def test_routes_of_every_plugin_answer(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
    source = write(
        tmp_path / "in",
        [
            ("chat", "/v1/chat/completions", chat),
            ("native", "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 2}}),
            ("vectors", "/v1/embeddings", {"input": ["a", "b"]}),
            ("ranking", "/v2/rerank", {"query": "a", "documents": ["b", "c"]}),
            ("refused", "/v1/embeddings", {"input": []}),
            ("outside", "/surprise", {"text": "a b c"}),
        ],
    )
    models = [str(zoo("llama")), str(zoo("bert")), str(zoo("bert-score"))]
    output = tmp_path / "out"
    running = start(*models, "--api-key", "secret", str(source), "-o", str(output))
    _, log = running.communicate(timeout=200)
    assert running.returncode == 1, log
    assert "6 of 6 answered, 1 of them with an error" in log
    answers = read(output)
    assert {name: answer["status_code"] for name, answer in answers.items()} == {
        "chat": 200, "native": 200, "vectors": 200, "ranking": 200, "refused": 400, "outside": 200,
    }  # fmt: skip
    assert answers["chat"]["body"]["usage"]["completion_tokens"] <= 3
    assert answers["outside"]["body"]["bits_per_token"] > 0
    assert len(answers["vectors"]["body"]["data"]) == 2
    assert len(answers["ranking"]["body"]["results"]) == 2
    assert "cannot be empty" in answers["refused"]["body"]["message"]


def test_an_interrupted_run_is_continued(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    names = [f"r{index}" for index in range(300)]
    source = write(tmp_path / "in", [(name, "/generate", body) for name in names])
    output = tmp_path / "out"
    arguments = [str(zoo("llama")), str(source), "-o", str(output), "--concurrency", "2"]
    running = start(*arguments)
    while running.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, log = running.communicate(timeout=60)
    assert running.returncode == 130, log
    assert "Stopped; the same command continues." in log
    assert "Traceback" not in log
    first = output.read_text()
    assert first.endswith("\n")
    assert 0 < len(read(output)) < len(names)
    again = start(*arguments)
    _, log = again.communicate(timeout=200)
    assert again.returncode == 0, log
    assert output.read_text().startswith(first)
    assert read(output).keys() == set(names)
