"""SGLang's frontend language and its benchmark script, from its own wheel, against a live server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("sglang",)
SET = (
    "`RuntimeEndpoint`: the server's address; `chat_template_name`, if the name of the model doesn't tell it; for "
    '`join("concate_and_append")`: `sglang.global_config.enable_parallel_encoding = False`. '
    "As with SGLang's own server, the methods of choosing but `token_length_normalized` fail"
)

Program = Callable[[str], dict[str, Any]]
NEAR = 1e-3
PROGRAMS = "import runpy, sglang_stubs; runpy.run_path('frontend.py', run_name='__main__')"
BENCHMARK = "import runpy, sglang_stubs; runpy.run_module('sglang.benchmark.serving', run_name='__main__')"


@pytest.fixture
def program(sglang: Callable[..., str], server: Any) -> Program:
    """A function from the name of a program in frontend.py to what it prints."""

    def run(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(sglang("-c", PROGRAMS, server.url, name).splitlines()[-1])
        return found

    return run


@pytest.fixture(scope="session")
def greedy(reference: tuple[Any, Any]) -> Callable[..., str]:
    """transformers' greedy continuation of a text."""
    import torch

    tokenizer, model = reference

    def generate(text: str, new_tokens: int = 24) -> str:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
        return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return generate


@pytest.fixture(scope="session")
def token_logprobs(reference: tuple[Any, Any]) -> Callable[..., list[float]]:
    """The log-probability of each token but the first of a list of ids, by transformers."""
    import torch

    tokenizer, model = reference

    def compute(text: str) -> list[float]:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            rows = model(ids).logits[0, :-1].float().log_softmax(-1)
        return [float(value) for value in rows.gather(1, ids[0, 1:, None])[:, 0]]

    return compute


def test_gen_in_a_chat(program: Program, greedy: Callable[..., str]) -> None:
    found = program("chat")
    answer = found["answer"]["value"]
    prompt = found["text"].removesuffix("<|im_end|>\n").removesuffix(answer)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer == greedy(prompt)
    assert "Paris" in answer
    assert found["answer"]["meta"]["finish_reason"]["type"] == "stop"


def test_a_batch_of_programs(program: Program, greedy: Callable[..., str]) -> None:
    for found, city in zip(program("batch")["answers"], ("Paris", "Tokyo", "Berlin"), strict=True):
        answer = found["answer"]["value"]
        assert answer == greedy(found["text"].removesuffix("<|im_end|>\n").removesuffix(answer))
        assert city in answer


def test_streamed_pieces_are_the_whole(program: Program, greedy: Callable[..., str]) -> None:
    found = program("stream")
    answer = "".join(found["pieces"])
    assert len(found["pieces"]) > 1
    assert answer == found["answer"]["value"] == greedy(found["text"].partition(answer)[0])


def test_asynchronous_pieces_with_their_meta_info(program: Program, greedy: Callable[..., str]) -> None:
    found = program("async_stream")
    answer = "".join(text for text, _ in found["pieces"])
    assert answer == found["answer"]["value"] == greedy(found["text"].partition(answer)[0])
    counts = [meta["completion_tokens"] for _, meta in found["pieces"]]
    assert counts == sorted(set(counts))
    assert found["answer"]["meta"]["finish_reason"]["type"] == "stop"


def test_restricted_variables(program: Program) -> None:
    found = program("constraints")
    patterns = {
        "colour": "red|green|blue",
        "year": r"[-+]?[0-9]+[ \n]*",
        "truth": "True|False",
        "number": r"[-+]?[0-9]+[ \n]*",
        "ratio": r"[-+]?[0-9]*\.?[0-9]*[ \n]*",
        "string": r'"[\w\s]*"?',  # it may be longer than max_tokens
    }
    for name, pattern in patterns.items():
        assert re.fullmatch(pattern, found[name]["value"]), (name, found[name]["value"])
    person = json.loads(found["object"]["value"])
    assert set(person) == {"name", "age"}
    assert len(person["name"]) <= 10
    assert person["age"] in range(100)


def test_a_program_that_calls_for_values(program: Program) -> None:
    found = program("calls")
    for text, prefix in zip(found["texts"], ("3 plus 4 is ", "3 plus 4 is ", "3 plus 5 is "), strict=True):
        assert re.fullmatch("[0-9]{1,3}", text.removeprefix(prefix))
    assert found["texts"][0] == found["texts"][1] == f"3 plus 4 is {found['value']}"


def test_turns_of_a_conversation(program: Program, greedy: Callable[..., str]) -> None:
    found = program("turns")
    assert [message["role"] for message in found["messages"]] == ["system", *["user", "assistant"] * 2]
    for number in range(2):
        answer = found[f"answer {number}"]["value"]
        before = found["text"].split("<|im_start|>assistant\n")[: number + 1]
        assert answer == greedy("<|im_start|>assistant\n".join([*before, ""]))
        assert found["messages"][2 + 2 * number]["content"] == answer.lstrip()


def test_joined_texts(program: Program) -> None:
    found = program("join")
    pattern = "Two numbers. Number 1 is ([0-9]). Number 2 is ([0-9])."
    assert re.fullmatch(f"{pattern} Their sum is [0-9]{{1,2}}", found["text"])
    assert found["whole"] == f" Their sum is {found['sum']['value']}"
    assert re.fullmatch("[0-9]", "".join(found["copied"])), "the copy's text is not in the program's"


def test_a_forked_program(program: Program, greedy: Callable[..., str]) -> None:
    found = program("fork")
    for number, detail in enumerate(found["detail"]["value"]):
        whole = greedy(f"{found['text']}Tip {number + 1} in other words:")
        assert detail == whole.partition("\n")[0]


def test_every_parameter_of_gen(program: Program, greedy: Callable[..., str]) -> None:
    found = program("parameters")["story"]
    assert found["meta"]["finish_reason"] == {"type": "length", "length": 32}
    assert found["value"] != greedy("Once upon a time, there was a", 32), "the penalties had no effect"


def test_gen_with_logprobs(program: Program, token_logprobs: Callable[..., list[float]]) -> None:
    found = program("logprobs")
    meta = found["answer"]["meta"]
    entries = meta["input_token_logprobs"] + meta["output_token_logprobs"]
    assert "".join(text for _, _, text in entries) == found["text"]
    assert entries[0][0] is None
    assert [value for value, _, _ in entries[1:]] == pytest.approx(token_logprobs(found["text"]), abs=NEAR)
    for entry, best in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert len(best) == 2
        assert best[0] == entry


def test_select_chooses_by_mean_log_probability(
    program: Program, token_logprobs: Callable[..., list[float]], reference: tuple[Any, Any]
) -> None:
    found = program("select")
    places = [" the water", " libraries", " trees"]
    for prompt, name, choices in (
        ("Fish live in", "place", places),
        (f"Fish live in{found['place']['value']}. One and one is", "sum", [" two", " seven"]),
    ):
        start = len(reference[0](prompt)["input_ids"]) - 2  # the client asks for the prompt's last token, too
        means = []
        for choice in choices:
            values = token_logprobs(prompt + choice)[start:]
            means.append(sum(values) / len(values))
        assert found[name]["meta"]["normalized_prompt_logprobs"] == pytest.approx(means, abs=NEAR)
        assert found[name]["value"] == choices[means.index(max(means))]
    assert found["text"] == "Fish live in the water. One and one is two"


def test_calls_of_the_backend(program: Program, server: Any) -> None:
    found = program("backend")
    info = httpx.get(f"{server.url}/get_model_info").json()
    assert found["model"] == info["model_path"]
    assert found["info"]["internal_states"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="streamed"),
        pytest.param(["--disable-stream"], id="whole"),
        pytest.param(["--tokenize-prompt", "--flush-cache", "--cache-report"], id="token ids"),
        pytest.param(["--return-logprob", "--logprob-start-len", "0", "--top-logprobs-num", "2"], id="logprobs"),
    ],
)
def test_the_benchmark_script(
    sglang: Callable[..., str], server: Any, demo: Path, tmp_path: Path, flags: list[str]
) -> None:
    output = tmp_path / "result.jsonl"
    command = ["-c", BENCHMARK, "--backend", "sglang", "--base-url", server.url, "--dataset-name", "random-ids"]
    command += ["--tokenizer", str(demo), "--num-prompts", "8", "--random-input-len", "64", "--random-output-len", "16"]
    command += ["--random-range-ratio", "0.5", "--output-file", str(output), "--output-details"]
    printed = sglang(*command, *flags)
    [found] = [json.loads(line) for line in output.read_text().splitlines()]
    assert found["completed"] == 8, printed
    assert not any(found["errors"]), found["errors"]
    assert found["total_output_tokens"] == sum(found["output_lens"])
    assert all(8 <= length <= 16 for length in found["output_lens"]), "ignore_eos: what was asked for, exactly"
    if "--disable-stream" not in flags:
        assert len(found["itls"]) == 8
        assert found["mean_ttft_ms"] > 0
