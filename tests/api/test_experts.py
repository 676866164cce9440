"""Expert statistics of a live server, where unpickling is forbidden and streams have no end of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))
Launch = Callable[..., Any]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dumps")


@pytest.fixture(scope="module")
def mixture(live: Launch, zoo: Callable[[str], Path], dumps: Path) -> Any:
    return live(
        str(zoo("qwen3-moe")), "--dtype", "float32", "--expert-dump-dir", str(dumps), "--served-model-name", "mixture"
    )


@pytest.fixture
def web(mixture: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=mixture.url, timeout=120) as client:
        yield client


def generate(web: httpx.Client, ids: list[int]) -> None:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}}
    assert web.post("/generate", json=body).status_code == 200


def test_the_order_of_sglangs_users(web: httpx.Client, dumps: Path) -> None:
    assert web.post("/flush_cache").status_code == 200
    assert web.post(START).text == "Start recording the expert distribution.\n"
    generate(web, [5, 6, 7, 8])
    assert web.get("/health_generate").status_code == 200
    assert web.get("/health").status_code == 200
    assert web.post(STOP).text == "Stop recording the expert distribution.\n"
    seen = web.get("/expert_distribution").json()
    assert (seen["model"], seen["tokens"], seen["passes"]) == ("mixture", 6, 3)  # the probe is left out
    assert web.post(DUMP).text == "Dump expert distribution record.\n"
    [file] = dumps.glob("*.pt")
    counts = torch.load(file, weights_only=True)["logical_count"].sum(0)
    assert counts.tolist() == [layer["counts"] for layer in seen["layers"]]
    assert counts.sum(1).tolist() == [6 * seen["top_k"]] * seen["num_layers"]


def test_the_stream_brings_an_event_a_second_and_ends_with_its_client(web: httpx.Client) -> None:
    events: list[dict[str, Any]] = []
    with web.stream("GET", "/expert_distribution/stream") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 2:
                break
    assert [event["model"] for event in events] == ["mixture"] * 2
    assert web.get("/expert_distribution").status_code == 200


def test_the_command_shows_it(mixture: Any) -> None:
    script = "from trunkline.core.cli import main; main()"
    command = [sys.executable, "-c", script, "experts", "--url", mixture.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "120"})
    assert "mixture: not recording, mode stat" in done.stdout
    assert "Busiest" in done.stdout


def test_a_stranger_needs_the_key(web: httpx.Client) -> None:
    for path in (START, STOP, DUMP, "/expert_distribution", "/expert_distribution/stream"):
        assert web.get(path, headers={"origin": "http://elsewhere.example"}).status_code == 403
    page = web.get("/expert_distribution/page")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.browser
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_browser_draws_the_heat_map(web: httpx.Client, tmp_path: Path) -> None:
    web.post(START)
    generate(web, list(range(20, 60)))
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--timeout=5000",
    ]
    page = f"{web.base_url}/expert_distribution/page".replace("//expert", "/expert")
    cells: list[list[int]] = []
    for _ in range(10):  # Chromium dumps once the page is loaded, which may be before its script has drawn
        drawn = subprocess.run(
            [*command, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        rows = re.findall(r"<tr.*?</tr>", drawn.split('id="map"')[1].split("</table>")[0], re.DOTALL)[1:]
        cells = [[int(cell.replace(",", "")) for cell in re.findall(r">([\d,]+)</td>", row)] for row in rows]
        if cells:
            break
    seen = web.get("/expert_distribution").json()
    assert cells == [layer["counts"] for layer in seen["layers"]]
    assert "Connected." in drawn


def test_a_stream_does_not_keep_the_server_from_stopping(live: Launch, zoo: Callable[[str], Path]) -> None:
    server = live(str(zoo("qwen3-moe")), "--dtype", "float32")
    ended = threading.Event()
    begun = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{server.url}/expert_distribution/stream", timeout=60) as answer:
            for _ in answer.iter_lines():
                begun.set()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    assert begun.wait(30)
    assert server.terminate() == 0
    assert ended.wait(30)
