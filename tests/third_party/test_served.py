"""An outside task served beside the project's own, from the command line to the answer."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import transformers

TEXT = "one two three four five"


@pytest.fixture(scope="module")
def model(zoo: Callable[[str], Path]) -> Path:
    return zoo("llama")


@pytest.fixture(scope="module")
def server(outside: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that chunks prompts, so that the stage sees a text in pieces."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    code = "import sys; from trunkline.core.cli import main; main()"
    flags = ["--dtype", "float32", "--chunked-prefill-size", "5", "--surprise-max-tokens", "100", "--port", str(port)]
    command: list[str | Path] = [outside / "python", "-c", code, "serve", model, *flags]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            while "ready to roll" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 0, log.read_text()


def test_the_answer_is_transformers_answer(server: str, model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        scores = reference(ids).logits[0, :-1].log_softmax(-1)
    expected = -scores.gather(1, ids[0, 1:, None]).mean().item() / math.log(2)
    answer = httpx.post(f"{server}/surprise", json={"text": TEXT}).json()
    assert answer["bits_per_token"] == pytest.approx(expected, abs=1e-4)
    assert answer["tokens"] == ids.shape[1] - 1


def test_tasks_share_what_they_have_computed(server: str) -> None:
    first = httpx.post(f"{server}/surprise", json={"text": TEXT}).json()
    body = {"text": TEXT, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    generated = httpx.post(f"{server}/generate", json=body).json()
    assert generated["meta_info"]["cached_tokens"] == first["tokens"]


def test_its_route_is_described_like_the_projects_own(server: str) -> None:
    document = httpx.get(f"{server}/openapi.json").json()
    operation, schemas = document["paths"]["/surprise"]["post"], document["components"]["schemas"]
    taken = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    given = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert (schemas[taken]["required"], sorted(schemas[given]["required"])) == (["text"], ["bits_per_token", "tokens"])
    assert set(schemas[given]["properties"]) == httpx.post(f"{server}/surprise", json={"text": TEXT}).json().keys()
    assert {"400", "401", "413", "503"} <= operation["responses"].keys()


def test_its_errors_are_the_servers_errors(server: str) -> None:
    refused = httpx.post(f"{server}/surprise", json={"text": ""})
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "The text needs at least two tokens."}})
    long = httpx.post(f"{server}/surprise", json={"text": TEXT * 30})
    assert long.status_code == 400
    assert "the limit is 100" in long.json()["error"]["message"]
    assert httpx.post(f"{server}/surprise", json={"text": 3}).status_code == 400


# -- a plugin of the generation plugin -------------------------------------------------------

DIGITS = {*"0123456789"}


def generate(server: str, custom: dict[str, object] | None, **sampling: object) -> httpx.Response:
    sampling = {"temperature": 1, "sampling_seed": 5, "max_new_tokens": 80, "ignore_eos": True, **sampling}
    body = {"text": TEXT, "sampling_params": {**sampling, "custom_params": custom}}
    return httpx.post(f"{server}/generate", json=body, timeout=60)


def test_a_logits_processor_acts_on_the_requests_that_ask_for_it(server: str) -> None:
    plain = generate(server, None).json()
    assert DIGITS & {*plain["text"]}
    with ThreadPoolExecutor(2) as pool:
        asking, other = pool.map(lambda custom: generate(server, custom).json(), [{"no_digits": True}, None])
    assert not DIGITS & {*asking["text"]}
    assert len(asking["output_ids"]) == 80
    assert other["output_ids"] == plain["output_ids"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_condition_ends_the_requests_that_ask_for_it(server: str, stream: bool) -> None:
    bias = {str(token): 4 for token in range(4, 40)}
    sampling = {"logit_bias": bias, "max_new_tokens": 200, "sampling_seed": 3}
    custom = {"max_sentences": 2}
    if stream:
        body = {"text": TEXT, "stream": True, "sampling_params": {**sampling, "custom_params": custom}}
        frames = httpx.post(f"{server}/generate", json=body, timeout=60).text.split("\n\n")
        answer = json.loads(frames[-3].removeprefix("data: "))
    else:
        answer = generate(server, custom, **sampling).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "max_sentences"}
    assert sum(map(answer["text"].count, ".!?")) == 2
    assert answer["text"][-1] in ".!?", "nothing is cut off"


def test_a_third_party_refuses_what_clients_send(server: str) -> None:
    answer = generate(server, {"max_sentences": "two"})
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "max_sentences must be an integer."}})


def test_chat_has_custom_params_too(server: str) -> None:
    body = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 60, "seed": 3, "ignore_eos": True}
    texts = [
        httpx.post(f"{server}/v1/chat/completions", json={**body, "custom_params": custom}, timeout=60).json()[
            "choices"
        ][0]["message"]["content"]
        for custom in (None, {"no_digits": True})
    ]
    assert [bool(DIGITS & {*text}) for text in texts] == [True, False]
