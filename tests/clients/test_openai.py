"""OpenAI's Python client, unmodified, against a live server, compared with transformers' numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.clients

CLIENTS = ("openai",)
SET = "`OpenAI(base_url=…/v1, api_key=…)`"

NEAR = 1e-3
PROMPT = "The capital of France is"
MESSAGES: list[Any] = [{"role": "user", "content": "Name a colour."}]
NEW_TOKENS = 12
TEXTS = ["A man is eating.", "Somebody has a meal.", "The sea is calm."]


class Trip(BaseModel):
    """Has no text of the model's own choice, so that greedy output ends soon."""

    city: Literal["Paris", "Rome", "Oslo"]
    days: int = Field(ge=1, le=9)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(reference: tuple[Any, Any]) -> Callable[[list[int]], tuple[list[int], list[float]]]:
    """transformers' greedy continuation of token ids, and the log-probability of every token but the first."""
    import torch

    _, model = reference

    def compute(prompt: list[int]) -> tuple[list[int], list[float]]:
        with torch.inference_mode():
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
            rows = model(ids).logits[0, :-1].float().log_softmax(-1)
        return ids[0, len(prompt) :].tolist(), rows.gather(1, ids[0, 1:, None])[:, 0].tolist()

    return compute


def prompt_ids(reference: tuple[Any, Any]) -> list[int]:
    return list(reference[0](PROMPT, add_special_tokens=False)["input_ids"])


def chat_ids(reference: tuple[Any, Any]) -> list[int]:
    text = reference[0].apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return list(reference[0](text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_completions(
    client: openai.OpenAI, reference: tuple[Any, Any], expected: Callable[..., Any], as_ids: bool, stream: bool
) -> None:
    prompt = prompt_ids(reference)
    given: Any = prompt if as_ids else PROMPT
    fields: Any = {"model": "any", "prompt": given, "max_tokens": NEW_TOKENS, "temperature": 0, "echo": True}
    fields |= {"logprobs": 2}
    if stream:
        chunks = list(client.completions.create(**fields, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        lists = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        tokens, values, offsets = (
            [item for each in lists for item in getattr(each, name) or []]
            for name in ("tokens", "token_logprobs", "text_offset")
        )
    else:
        [choice] = client.completions.create(**fields).choices
        assert choice.logprobs is not None
        text, tokens, values = choice.text, choice.logprobs.tokens, choice.logprobs.token_logprobs
        offsets = choice.logprobs.text_offset
    output, logprobs = expected(prompt)
    assert text == PROMPT + reference[0].decode(output, skip_special_tokens=True)
    assert "".join(tokens or []).startswith(text)
    assert values is not None
    assert values[0] is None
    assert values[1:] == pytest.approx(logprobs, abs=NEAR)
    assert offsets is not None
    for token, offset in zip(tokens or [], offsets, strict=True):
        assert text[offset : offset + len(token)] == token or offset == len(text)


def test_several_prompts_and_samples(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="any", prompt=[PROMPT, "One, two,"], n=2, seed=1, max_tokens=4, stop="\n")
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.completion_tokens >= 4


def test_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="400"):
        client.completions.create(model="any", prompt=PROMPT, suffix="x")
    with pytest.raises(openai.BadRequestError, match="400"):
        client.completions.create(model="any", prompt=PROMPT, best_of=2)


def test_chat(client: openai.OpenAI, reference: tuple[Any, Any], expected: Callable[..., Any]) -> None:
    prompt = chat_ids(reference)
    [choice] = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0, logprobs=True, top_logprobs=3
    ).choices
    output, logprobs = expected(prompt)
    assert choice.message.content == reference[0].decode(output, skip_special_tokens=True)
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [entry.logprob for entry in content] == pytest.approx(logprobs[-len(output) :], abs=NEAR)
    for entry in content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert len(entry.top_logprobs) == 3


def test_the_streaming_helper(client: openai.OpenAI, reference: tuple[Any, Any], expected: Callable[..., Any]) -> None:
    output, _ = expected(chat_ids(reference))
    output = output[: output.index(output[7]) + 1]
    deltas, logprobs = [], []
    with client.chat.completions.stream(
        model="any",
        messages=MESSAGES,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=True,
        stream_options={"include_usage": True},
        extra_body={"stop_token_ids": output[-1:], "no_stop_trim": True},  # the helper raises for the reason "length"
    ) as stream:
        for event in stream:
            if event.type == "content.delta":
                deltas.append(event.delta)
            elif event.type == "logprobs.content.delta":
                logprobs += event.content
        final = stream.get_final_completion()
    [choice] = final.choices
    assert "".join(deltas) == choice.message.content == reference[0].decode(output, skip_special_tokens=True)
    assert [entry.token for entry in logprobs] == [reference[0].decode([token]) for token in output]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == len(output)
    assert final.usage is not None
    assert final.usage.completion_tokens == len(output)


def test_samples_in_a_stream(client: openai.OpenAI) -> None:
    fields: Any = {"model": "any", "messages": MESSAGES, "n": 3, "max_tokens": 6, "seed": 7}
    whole = client.chat.completions.create(**fields)
    texts = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


PLAN: Any = {"model": "any", "messages": [{"role": "user", "content": "Plan a trip."}], "temperature": 0}


def test_parsed_output(client: openai.OpenAI) -> None:
    whole = client.chat.completions.parse(**PLAN, max_tokens=200, response_format=Trip)
    assert isinstance(whole.choices[0].message.parsed, Trip)
    with client.chat.completions.stream(**PLAN, max_tokens=200, response_format=Trip) as stream:
        partial = [event.parsed for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion()
    assert len(partial) > 2
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


def test_parsed_arguments_of_tools(client: openai.OpenAI) -> None:
    tools: Any = {"tools": [openai.pydantic_function_tool(Trip, name="book")], "tool_choice": "required"}
    fields = {**PLAN, **tools, "parallel_tool_calls": False, "max_tokens": 200}
    [call] = client.chat.completions.parse(**fields).choices[0].message.tool_calls or []
    assert call.function.name == "book"
    assert isinstance(call.function.parsed_arguments, Trip)
    with client.chat.completions.stream(**fields) as stream:
        done = [event.parsed_arguments for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert done == [call.function.parsed_arguments]
    assert final.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Booked."}
    history = [*PLAN["messages"], {"role": "assistant", "tool_calls": [call.model_dump()]}, result]
    asked = {**fields, "tool_choice": "none", "messages": history, "max_tokens": NEW_TOKENS}
    after = client.chat.completions.create(**asked)
    assert after.choices[0].message.content


def test_responses(client: openai.OpenAI, generated: Callable[..., Any]) -> None:
    fields: Any = {"model": "any", "input": MESSAGES[0]["content"], "temperature": 0, "max_output_tokens": NEW_TOKENS}
    whole, expected = client.responses.create(**fields), generated(MESSAGES)
    assert whole.output_text == expected["text"]
    assert whole.usage is not None
    assert whole.usage.output_tokens == expected["meta_info"]["completion_tokens"]
    with client.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected["text"]


def test_responses_with_parsed_output_and_tools(client: openai.OpenAI) -> None:
    fields: Any = {"model": "any", "input": "Plan a trip.", "temperature": 0, "max_output_tokens": 200}
    whole = client.responses.parse(**fields, text_format=Trip)
    assert isinstance(whole.output_parsed, Trip)
    with client.responses.stream(**fields, text_format=Trip) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed
    schema = Trip.model_json_schema() | {"additionalProperties": False}
    tool: Any = {"type": "function", "name": "book", "parameters": schema, "strict": True}
    forced: Any = {"type": "function", "name": "book"}
    [call] = client.responses.parse(**fields, tools=[tool], tool_choice=forced).output
    assert call.type == "function_call"
    assert Trip.model_validate_json(call.arguments)


@pytest.mark.parametrize("form", ["base64", "float"])
def test_embeddings(vector_server: Any, vectors_of: Callable[..., Any], form: Any) -> None:
    """By default, the client asks for base64 and decodes it."""
    with openai.OpenAI(base_url=f"{vector_server.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {} if form == "base64" else {"encoding_format": form}
        reply = client.embeddings.create(model="any", input=TEXTS, **asked)
    np.testing.assert_allclose(np.array([entry.embedding for entry in reply.data]), vectors_of(TEXTS), atol=1e-5)
