"""The deterministic mode over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

MODE = "--enable-deterministic-inference"


@pytest.mark.demo
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model(dtype: str, live: Any) -> None:
    """Alone and cold, alone and cached, and 5 at the same time, in chunks and with a common prefix."""
    model = "demo:smollm2-135m-instruct"
    server = live(model, "--dtype", dtype, MODE, "--chunked-prefill-size", "128", "--max-stall-ms", "20")
    info = httpx.get(f"{server.url}/server_info").json()
    assert info["enable_deterministic_inference"] is True
    assert info["attention_backend"] == "cpu"
    prompts = [list(range(1000, 1100)) + list(range(2000, 2000 + 37 * n)) for n in range(1, 6)]

    def reply(number: int) -> Any:
        body = {
            "input_ids": prompts[number],
            "sampling_params": {"temperature": 0.7, "max_new_tokens": 16, "ignore_eos": True, "sampling_seed": number},
            "return_logprob": True,
            "logprob_start_len": 90,
            "top_logprobs_num": 3,
        }
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=300).json()
        logprobs = [answer["meta_info"][f"{side}_{kind}"] for side in ("input", "output")
                    for kind in ("token_logprobs", "top_logprobs")]  # fmt: skip
        return answer["output_ids"], logprobs

    def cold(number: int) -> Any:
        httpx.post(f"{server.url}/flush_cache")
        return reply(number)

    alone = [cold(number) for number in range(len(prompts))]
    assert [reply(number) for number in range(len(prompts))] == alone
    httpx.post(f"{server.url}/flush_cache")
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(reply, range(len(prompts)))) == alone
