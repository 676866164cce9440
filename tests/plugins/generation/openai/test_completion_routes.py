"""``/v1/completions`` with a scripted engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.plugins.generation.openai.requests import chunks_of, complete
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.openai.defaults import completion_defaults

END = {"type": "length", "length": 1}


async def reply(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await complete(client, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def events(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    return chunks_of(await complete(client, stream=True, **body))


async def test_a_reply(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says(" fox", {"type": "stop", "matched": "x"})
    answer = await reply(client, stop="x")
    (item,) = engine.items
    assert byte_level.decode(item.prompt) == "hello"
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "any")
    choice = {"index": 0, "text": " fo", "logprobs": None, "finish_reason": "stop", "matched_stop": "x"}
    assert answer["choices"] == [choice]
    done = len(engine.replies[0].tokens)
    assert answer["usage"] == {
        "prompt_tokens": len(item.prompt),
        "completion_tokens": done,
        "total_tokens": len(item.prompt) + done,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["metadata"] == {"weight_version": "default"}
    assert item.params.logprobs is None


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["hello", "fox"], ["hello", "fox"]),
        (["fox"], ["fox"]),
        ("ids", ["the fox"]),
        ("lists of ids", ["the fox", "lazy"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_prompts(
    client: httpx.AsyncClient, engine: Any, byte_level: Any, prompt: Any, texts: list[str], stream: bool, n: int
) -> None:
    if prompt in ("ids", "lists of ids"):
        ids = [byte_level.encode(text, add_special_tokens=False) for text in texts]
        prompt = ids if prompt == "lists of ids" else ids[0]
    engine.script = lambda item: [item.prompt[-1], END]
    chosen = [texts[index] for index in range(len(texts)) for _ in range(n)]
    ends = [byte_level.decode(byte_level.encode(text, add_special_tokens=False)[-1:]) for text in chosen]
    if stream:
        chunks = [chunk["choices"][0] for chunk in await events(client, prompt=prompt, n=n, echo=True)]
        shown = ["".join(c["text"] for c in chunks if c["index"] == index) for index in range(len(chosen))]
    else:
        answer = await reply(client, prompt=prompt, n=n, echo=True)
        shown = [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(chosen)))
        counts = [len(byte_level.encode(text, add_special_tokens=False)) for text in texts]
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (sum(counts), len(chosen))
    assert shown == [text + end for text, end in zip(chosen, ends, strict=True)]


async def test_sampling_reaches_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    await complete(client)
    params = engine.items[-1].params
    assert (params.max_new_tokens, params.temperature) == (16, 1.0)
    await complete(client, max_tokens=3, seed=9, temperature=0.5, logit_bias={"5": 1}, min_tokens=1, best_of=1)
    params = engine.items[-1].params
    assert (params.max_new_tokens, params.seed, params.temperature, params.min_new_tokens) == (3, 9, 0.5, 1)
    assert params.logit_bias == ((5, 1.0),)
    await complete(client, max_tokens=-1)
    assert engine.items[-1].params.max_new_tokens > 50
    await complete(client, prompt=[5] * 85)  # the default limit is lowered to what fits
    assert engine.items[-1].params.max_new_tokens == 100 - 2 - 85


def test_defaults(tmp_path: Any) -> None:
    assert completion_defaults(str(tmp_path), "model") == {"temperature": 1.0, "max_new_tokens": 16}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "max_new_tokens": 5}')
    assert completion_defaults(str(tmp_path), "model") == {"temperature": 0.2, "max_new_tokens": 16}


async def test_preferred_parameters(engine: Any, make_app: Any) -> None:
    app = make_app(engine, preferred_sampling_params='{"max_new_tokens": 5}')
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await complete(client)
        await complete(client, max_tokens=7)
    assert [item.params.max_new_tokens for item in engine.items] == [5, 7]


async def test_usage_in_streams(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("the fox")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(client, n=2, stream_options=options)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(engine.replies[-1].tokens)
    assert all(chunk["usage"]["prompt_tokens"] == len(engine.items[0].prompt) for chunk in chunks[:-1])
    plain = await events(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in plain[:-1])
    assert all("usage" not in chunk for chunk in await events(client))
    assert plain[-2]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in plain[:-2])


async def test_token_ids(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("the fox")
    [choice] = (await reply(client, return_token_ids=True))["choices"]
    prompt, tokens = engine.items[0].prompt, engine.replies[0].tokens
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, tokens)
    chunks = [chunk["choices"][0] for chunk in await events(client, return_token_ids=True)]
    assert [token for chunk in chunks for token in chunk.get("token_ids", [])] == tokens
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize("prompt", ["hello", [5, 6]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_without_output(client: httpx.AsyncClient, engine: Any, prompt: Any, stream: bool) -> None:
    engine.with_results = True
    body = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1}
    if stream:
        [chunk] = await events(client, **body)
        [choice] = chunk["choices"]
    else:
        [choice] = (await reply(client, **body))["choices"]
    assert (len(choice["logprobs"]["tokens"]), choice["finish_reason"]) == (len(engine.items[0].prompt), "length")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"prompt": ""}, "Prompt cannot be empty", "prompt"),
        ({"prompt": []}, "Prompt cannot be empty", "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]: Prompt cannot be empty", "prompt[1]"),
        ({"prompt": ["a", 5]}, "prompt[1]: texts and token ids are mixed", "prompt[1]"),
        ({"prompt": [[5], "a"]}, "prompt[0]: texts and token ids are mixed", "prompt[0]"),
        ({"prompt": [5, [5]]}, "prompt mixes ids and lists of ids.", "prompt"),
        ({"prompt": [[5], []]}, "prompt[1]: a list of ids cannot be empty.", "prompt[1]"),
        ({"prompt": [5, -1], "echo": True}, "The prompt contains a negative value: -1.", "prompt"),
        ({"prompt": [[5], [100000]], "echo": True}, "prompt[1]: The prompt contains values greater", "prompt[1]"),
        ({"prompt": [5] * 100}, "The input (100 tokens)", "prompt"),
        ({"prompt": [[5]] * 17}, "The request asks for 17 sequences", None),
        ({"prompt": ["a"] * 9, "n": 2}, "The request asks for 18 sequences", None),
        ({"max_tokens": 0}, "max_tokens must be at least 1 (0 with echo), or -1 for no limit; got 0.", "max_tokens"),
        ({"max_tokens": -2, "echo": True}, "max_tokens must be at least 0, or -1 for no limit; got -2.", "max_tokens"),
        ({"max_tokens": 100}, "max_tokens is too large: 100. This model's maximum context length is 100", "max_tokens"),
        ({"logprobs": 51}, "logprobs must be in [0, 50], got 51.", "logprobs"),
        ({"logprobs": -1}, "logprobs must be in [0, 50], got -1.", "logprobs"),
        ({"suffix": "x"}, "suffix is not supported", "suffix"),
        ({"best_of": 2}, "best_of must be equal to n (1), got 2", "best_of"),
        ({"best_of": 1, "n": 2}, "best_of must be equal to n (2), got 1", "best_of"),
        ({"use_beam_search": True}, "use_beam_search is not supported yet", "use_beam_search"),
        ({"temperature": -1}, "temperature must be a non-negative finite number", "temperature"),
        ({"min_tokens": 17}, "min_tokens must be in [0, max_tokens(16)], got 17.", "min_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str, param: str | None, stream: bool
) -> None:
    response = await complete(client, **body, stream=stream)
    assert response.status_code == 400
    answer = response.json()
    assert answer["message"].startswith(message)
    assert (answer["object"], answer["type"], answer["code"]) == ("error", "BadRequestError", 400)
    assert answer["param"] == param
    assert engine.items == []


async def test_too_many_log_probabilities_are_refused(make_engine: Any, make_app: Any) -> None:
    engine = make_engine(context_length=100_000, max_total_tokens=100_000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as client:
        response = await complete(client, logprobs=50, max_tokens=-1)
    assert response.status_code == 400
    assert response.json()["message"].startswith("The request asks for up to 5099")
    assert response.json()["param"] == "logprobs"


async def test_a_model_without_tokenizer_is_refused(make_engine: Any, make_app: Any) -> None:
    engine = make_engine(None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as client:
        response = await complete(client, prompt=[5])
    assert response.json()["message"] == "fake has no tokenizer; use /generate with input_ids."


async def test_an_error_in_a_stream(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [50, RequestError("the engine stopped", status=503)]
    *_, last = await events(client)
    assert last["error"]["message"] == "the engine stopped"


async def test_an_error_names_its_prompt(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [RequestError("no")] if item.prompt == [6] else [5, END]
    answer = (await complete(client, prompt=[[5], [6]])).json()
    assert (answer["message"], answer["code"]) == ("no", 400)
