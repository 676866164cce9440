"""Everything at once: all tasks, short, long, truncated and hopeless inputs, clients that hang up. Nothing stalls."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

WORDS = ("the", "sea", "other", "nothing", "else", "there", "in", "it")
CLIENTS = 16
ROUTES = (
    "/generate", "/encode", "/v1/embeddings", "/embed", "/v1/rerank", "/rerank", "/v2/rerank", "/score", "/classify",
    "/v1/classify",
)  # fmt: skip
PATIENCE = 60.0  # seconds without an answer that count as a stall; the usual answer takes well under one
TOKENS = 1024  # of the pools: far fewer than the clients ask for, so requests wait, retract and evict


@pytest.fixture(scope="module")
def fleet(zoo: Callable[[str], Path], live: Callable[..., Any]) -> Any:
    """A model with two tasks that decodes, and one of every other kind; pools that are too small for the load."""
    shared = ["--dtype", "float32", "--threads", "1", "--chunked-prefill-size", "64"]
    shared += ["--max-total-tokens", str(TOKENS), "--max-running-requests", "8"]
    models = [
        *("--model-path", str(zoo("llama")), "--served-model-name", "talks", "--task", "generation,embedding"),
        *("--model-path", str(zoo("bert")), "--served-model-name", "embeds"),
        *("--model-path", str(zoo("gemma3-base")), "--served-model-name", "means"),
        *("--model-path", str(zoo("bert-score")), "--served-model-name", "ranks"),
        *("--model-path", str(zoo("llama-score")), "--served-model-name", "rewards"),
        *("--model-path", str(zoo("qwen3-yes-no")), "--served-model-name", "judges", "--task", "rerank"),
        *("--model-path", str(zoo("mpnet")), "--served-model-name", "pads"),
    ]
    return live(*shared, *models)


def text(chance: random.Random) -> str:
    """From one word to several times the context (512 tokens)."""
    words = chance.choice((1, 4, 30, 150, 400, 2000))
    return " ".join(chance.choice(WORDS) for _ in range(words))


def shared_prefix(chance: random.Random) -> list[str]:
    """A prompt with several answers."""
    prompt = " ".join(WORDS) * chance.randint(1, 8)
    return [f"{prompt} {chance.choice(WORDS)}" for _ in range(4)]


def job(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Any route with any input."""
    truncate = chance.choice(("none", "start", "end", True))
    texts: Any = text(chance) if chance.random() < 0.5 else [text(chance) for _ in range(chance.randint(1, 6))]
    kind = chance.randrange(8)
    if kind == 0:
        params = {"max_new_tokens": chance.choice((0, 1, 8, 64, 400)), "ignore_eos": True}
        return "/generate", {"text": texts, "sampling_params": params, "model": "talks"}
    if kind == 1:
        path, model = chance.choice(("/v1/rerank", "/rerank", "/v2/rerank")), chance.choice(("ranks", "judges"))
        documents = [text(chance) for _ in range(chance.randint(1, 6))]
        return path, {"query": "the sea", "documents": documents, "truncate": truncate, "model": model}
    if kind == 2:
        model = chance.choice(("rewards", "ranks"))
        return "/classify", {"text": shared_prefix(chance), "truncate": truncate, "model": model}
    if kind == 3:
        return "/v1/classify", {"input": texts, "truncate": truncate, "model": "rewards"}
    if kind == 6:
        pair = {"text_1": "the sea", "text_2": texts}
        return "/score", pair | {"truncate": truncate, "model": chance.choice(("ranks", "judges"))}
    model = chance.choice(("talks", "embeds", "means", "pads"))
    if kind == 7:
        return "/embed", {"inputs": texts, "truncate": truncate, "model": model}
    if kind == 4:
        return "/v1/embeddings", {"input": texts, "truncate": truncate, "model": model}
    return "/encode", {"text": texts, "truncate": truncate, "model": model}


async def client(http: httpx.AsyncClient, chance: random.Random, until: float, seen: Counter[str]) -> None:
    """One request after another; now and then it hangs up on one."""
    while time.monotonic() < until:
        path, body = job(chance)
        hurried = chance.random() < 0.1
        try:
            async with asyncio.timeout(chance.uniform(0.0, 0.3) if hurried else PATIENCE):
                answer = await http.post(path, json=body)
        except TimeoutError:
            assert hurried, f"stalled: {path} {str(body)[:200]}"
            seen["hung up"] += 1
            continue
        assert answer.status_code in (200, 400, 503), answer.text[:500]
        if answer.status_code == 400:
            assert "tokens" in answer.text, answer.text[:500]  # too long: nothing else is wrong with them
        seen[f"{path} {answer.status_code}"] += 1
        seen["truncated"] += '"truncated":true' in answer.text


async def storm(url: str, seconds: float, seed: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=2 * CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http, asyncio.TaskGroup() as group:
        for index in range(CLIENTS):
            group.create_task(client(http, random.Random(seed + index), until, seen))
    return seen


def check(server: Any, seen: Counter[str]) -> None:
    """Every route worked, and afterwards the server is as it was: idle, empty, healthy."""
    for path in ROUTES:
        assert seen[f"{path} 200"] > 0, seen
    assert seen["truncated"] > 0
    assert seen["hung up"] > 0
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        models = [model["id"] for model in http.get("/v1/models").json()["data"]]

        def states() -> list[dict[str, Any]]:
            return [http.get(f"/get_server_info?model={name}").json()["internal_states"][0] for name in models]

        deadline = time.monotonic() + PATIENCE
        while any(state["num_running_reqs"] or state["num_waiting_reqs"] for state in states()):
            assert time.monotonic() < deadline, states()
        assert http.get("/health_generate").status_code == 200
        assert http.post("/flush_cache").status_code == 200
        assert [state["engine_restarts"] for state in states()] == [0] * len(models)
        while [state["free_tokens"] for state in states()] != [TOKENS] * len(models):  # as of the last heartbeat
            assert time.monotonic() < deadline, states()
    assert "Traceback" not in server.log.read_text()


async def test_mixed_load_never_stalls(fleet: Any) -> None:
    check(fleet, await storm(fleet.url, 8, seed=1))


@pytest.mark.soak
async def test_mixed_load_never_stalls_for_minutes(fleet: Any) -> None:
    for seed in range(6):
        check(fleet, await storm(fleet.url, 30, seed=100 * seed))
