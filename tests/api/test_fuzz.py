"""schemathesis with all its checks against live servers: replies are what ``/openapi.json`` says, whatever is sent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

KEY = "key-of-clients"
LOCKED_SECONDS = 60  # of the budget, for the server with a key
LEFT_SECONDS = 120  # of the budget, for test_fuzz_sampling.py
RESERVE = 90.0  # seconds of the budget for the start of the second server, and for the start of schemathesis
EXAMPLES = 200  # a route and mode without a budget
# 400: much that makes a body valid can't be said in a schema, from token ids to what a model's prompts are called.
CONFIG = """
hooks = "fuzz_hooks"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404"]
"""
REPLACED = "negative_data_rejection"  # by wrong_bodies_are_refused
ENDLESS = "/expert_distribution/stream"
# What makes all other requests wait, or refuses whatever is sent; these have tests of their own.
HALTING = (
    "/pause_generation", "/release_memory_occupation", "/slow_down", "/update_weights_from_distributed",
    "/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_ipc",
)  # fmt: skip


def run(url: str, key: str, seconds: float | None, seed: int, folder: Path) -> None:
    """schemathesis over all routes but the stream without an end, and those that halt the server."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)]
    command += [
        "run",
        f"{url}/openapi.json",
        "--checks",
        "all",
        "--exclude-checks",
        REPLACED,
        "--seed",
        str(seed),
        *(part for path in (ENDLESS, *HALTING) for part in ("--exclude-path", path)),
    ]
    command += ["--request-timeout", "60", "--continue-on-failure", "--no-color", "--generation-database", "none"]
    command += ["--max-examples", str(EXAMPLES)] if seconds is None else ["--max-time", str(int(seconds))]
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    own = {"TRUNKLINE_URL": url, "TRUNKLINE_KEY": f"Bearer {key or None}"}
    environment = {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/start_profile writes files, and would do so to /tmp."""
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))


@pytest.mark.field
@pytest.mark.fuzz
def test_every_task_on_one_port(
    suite: Any, live: Callable[..., Any], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("weights", "dumps")]
    for folder in folders:
        folder.mkdir()
    files = ["--allow-weights-dir", str(folders[0]), "--expert-dump-dir", str(folders[1]), "--enable-metrics"]
    models = [str(zoo("llama")), "--task", "generation,embedding", *(str(zoo(name)) for name in MODELS)]
    server = live("--dtype", "float32", "--threads", "1", *files, *models)
    limit = None if suite.seconds is None else max(30.0, suite.left - LOCKED_SECONDS - LEFT_SECONDS - RESERVE)
    run(server.url, "", limit, suite.seed, tmp_path)
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200
    body = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 2}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)  # a paused server doesn't answer
    assert answer.status_code == 200, answer.text
    assert httpx.get(f"{server.url}/server_info").json()["internal_states"][0]["engine_restarts"] == 0
    suite.notes.append(f"schemathesis, seed {suite.seed}, {'no limit' if limit is None else f'{limit:.0f} s'}")


MODELS = ("bert", "bert-score", "qwen2-labels", "mixtral")


@pytest.mark.field
@pytest.mark.fuzz
def test_a_server_with_a_key(suite: Any, live: Callable[..., Any], zoo: Callable[[str], Path], tmp_path: Path) -> None:
    server = live("--dtype", "float32", "--threads", "1", "--api-key", KEY, str(zoo("llama")), key=KEY)
    run(server.url, KEY, None if suite.seconds is None else LOCKED_SECONDS, suite.seed, tmp_path)
