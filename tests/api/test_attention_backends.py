"""Every task over HTTP gives the same on Triton kernels, in Triton's interpreter, as on plain torch kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton isn't installed")

MODELS = {"talks": "llama", "mixes": "qwen3-moe", "embeds": "bert", "ranks": "bert-score", "labels": "qwen2-labels"}
TEXTS = ["the sea and the other there", "one of these words", "that and this"]
SAMPLING = {"max_new_tokens": 6, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": TEXTS[0]}]
VOLATILE = {"id", "created", "e2e_latency", "latency", "queue_time", "weight_version", "received_sent", "timestamp"}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"model": "talks", "text": TEXTS[0], "sampling_params": SAMPLING | {"temperature": 0}}),
    (
        "/generate",
        {
            "model": "mixes",
            "input_ids": [list(range(5, 40)), [9, 8]],
            "sampling_params": SAMPLING | {"top_p": 0.9, "top_k": 40, "sampling_seed": 3, "frequency_penalty": 0.4},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
        },
    ),
    ("/v1/completions", {"model": "talks", "prompt": TEXTS, "max_tokens": 5, "seed": 1, "logprobs": 2, "echo": True}),
    ("/v1/chat/completions", {"model": "talks", "messages": MESSAGES, "max_tokens": 5, "seed": 1}),
    ("/encode", {"model": "embeds", "text": TEXTS}),
    ("/v1/embeddings", {"model": "embeds", "input": TEXTS}),
    ("/v1/rerank", {"model": "ranks", "query": TEXTS[0], "documents": TEXTS}),
    ("/v1/score", {"model": "ranks", "text_1": TEXTS[0], "text_2": TEXTS[1:]}),
    ("/classify", {"model": "labels", "text": TEXTS}),
]


def answers(url: str) -> list[Any]:
    """The replies to all requests, then the experts that were chosen."""
    with httpx.Client(base_url=url, timeout=120) as client:
        assert client.post("/start_expert_distribution_record", params={"model": "mixes"}).status_code == 200
        found = []
        for path, body in REQUESTS:
            reply = client.post(path, json=body)
            assert reply.status_code == 200, (path, reply.text)
            found.append(steady(reply.json()))
        distribution = client.get("/expert_distribution", params={"model": "mixes"})
        assert distribution.status_code == 200, distribution.text
        return [*found, steady(distribution.json())]


def steady(value: Any) -> Any:
    """Without what differs between two runs."""
    if isinstance(value, Mapping):
        return {name: steady(each) for name, each in value.items() if name not in VOLATILE}
    return [steady(each) for each in value] if isinstance(value, list) else value


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal but for the last digits of floats."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-3), where
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for name, each in expected.items():
            assert_close(found[name], each, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.mark.interpreter
def test_every_task(live: Callable[..., Any], zoo: Callable[[str], Path]) -> None:
    arguments = []
    for name, checkpoint in MODELS.items():
        arguments += ["--model-path", str(zoo(checkpoint)), "--served-model-name", name]
    common = ["--dtype", "float32", "--threads", "1", "--attention-backend"]
    plain = live(*common, "torch_native", *arguments)
    triton = live(*common, "triton", *arguments, environment={"TRITON_INTERPRET": "1"})
    for name in MODELS:
        assert httpx.get(f"{triton.url}/model_info", params={"model": name}).json()["attention_backend"] == "triton"
    assert_close(answers(triton.url), answers(plain.url))
