"""OpenAI's routes of a live server against its native route: the same texts, token ids and log-probabilities."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

PROMPTS = ["the quick brown fox", "hello 世界"]
NEW_TOKENS = 6


def native(http: httpx.Client, prompt: Any, **sampling: Any) -> dict[str, Any]:
    """The record of ``/generate`` for a text or ids."""
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, **sampling}
    body = {"text" if isinstance(prompt, str) else "input_ids": prompt, "sampling_params": params}
    body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "return_prompt_token_ids": True}
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def choices(http: httpx.Client, path: str, body: dict[str, Any], *, stream: bool) -> list[dict[str, Any]]:
    """The choices of a reply, or what a stream's chunks make together."""
    answer = http.post(path, json=body | {"stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        return list(answer.json()["choices"])
    joined: dict[int, dict[str, Any]] = {}
    for event in answer.text.split("\n\n")[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            one = joined.setdefault(choice["index"], {"text": "", "logprobs": {}, "token_ids": []})
            one["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            one["token_ids"] += choice.get("token_ids", [])
            for name, items in (choice["logprobs"] or {}).items():
                if items is not None:
                    one["logprobs"].setdefault(name, []).extend(items)
    return [joined[index] for index in sorted(joined)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_completions(http: httpx.Client, stream: bool, n: int) -> None:
    records = [native(http, prompt) for prompt in PROMPTS]
    body = {"prompt": PROMPTS, "max_tokens": NEW_TOKENS, "temperature": 0, "n": n, "echo": True}
    body |= {"logprobs": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    found = choices(http, "/v1/completions", body, stream=stream)
    assert len(found) == n * len(PROMPTS)
    for index, choice in enumerate(found):
        record, meta = records[index // n], records[index // n]["meta_info"]
        assert choice["text"] == PROMPTS[index // n] + record["text"]
        assert choice["token_ids"] == record["output_ids"]
        entries = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for _, token, _ in entries]
        values = choice["logprobs"]["token_logprobs"]
        assert values[0] is None
        assert values[1:] == pytest.approx([value for value, _, _ in entries[1:]], abs=1e-4)
        ranked = [*meta["input_top_logprobs"], *meta["output_top_logprobs"]]
        for (value, token, _), theirs, ours in zip(
            entries[1:], ranked[1:], choice["logprobs"]["top_logprobs"][1:], strict=True
        ):
            expected = {f"token_id:{each}": number for number, each, _ in [*theirs, (value, token, None)]}
            assert ours == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_only(http: httpx.Client, stream: bool) -> None:
    records = [native(http, prompt) for prompt in PROMPTS]
    ids = [record["prompt_token_ids"] for record in records]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    for choice, record, prompt in zip(
        choices(http, "/v1/completions", body, stream=stream), records, PROMPTS, strict=True
    ):
        entries = record["meta_info"]["input_token_logprobs"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            [value for value, _, _ in entries[1:]], abs=1e-4
        )
        assert choice["text"] == prompt


@pytest.mark.parametrize("stream", [False, True])
def test_chat(http: httpx.Client, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": NEW_TOKENS, "temperature": 0}
    body |= {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
    prompt = http.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]
    record = native(http, prompt)
    [choice] = choices(http, "/v1/chat/completions", body, stream=stream)
    content = choice["logprobs"]["content"]
    assert choice["token_ids"] == record["output_ids"]
    entries = record["meta_info"]["output_token_logprobs"]
    assert [entry["logprob"] for entry in content] == pytest.approx([value for value, _, _ in entries], abs=1e-4)
    for entry, theirs in zip(content, record["meta_info"]["output_top_logprobs"], strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([one[0] for one in theirs], abs=1e-4)


def test_a_refusal_does_not_end_the_server(http: httpx.Client) -> None:
    for body in ({"prompt": [2**63 - 1], "echo": True}, {"prompt": [-(2**63)], "echo": True}, {"prompt": [[]]}):
        assert http.post("/v1/completions", json=body).status_code == 400
    assert http.post("/v1/completions", json={"prompt": [2**70]}).status_code == 400
    surrogate = b'{"prompt": "\\ud800", "max_tokens": 1}'
    headers = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=surrogate, headers=headers).status_code == 400
    assert http.get("/health_generate").status_code == 200


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
OBJECT = r'\{\s*"a"\s*:\s*"[xy]"\s*,\s*"b"\s*:\s*(true|false)\s*\}'
PATHS = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": NAMED}, OBJECT),
        ({"json_schema": SCHEMA}, OBJECT),
        ({"guided_json": SCHEMA}, OBJECT),
        ({"structured_outputs": {"json": SCHEMA}}, OBJECT),
        ({"response_format": {"type": "json_object"}}, r"\{[\s\S]*"),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"ebnf": 'root ::= "red" | "green"'}, "red|green"),
        ({"guided_choice": ["a.b (c)", "1+1"]}, r"a\.b \(c\)|1\+1"),
        ({"structured_outputs": {"choice": ["a|b"]}}, r"a\|b"),
    ],
)
def test_grammars(http: httpx.Client, path: str, stream: bool, fields: dict[str, Any], pattern: str) -> None:
    limit = 400 if pattern == OBJECT else 20  # it may have much whitespace
    body = PATHS[path] | fields | {"max_tokens": limit, "seed": 1, "temperature": 1}
    for choice in choices(http, path, body, stream=stream):
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"guided_regex": "("}, "guided_regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": 5}}}},
            "response_format",
        ),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar"),
    ],
)
def test_invalid_grammars_are_a_400_that_names_the_field(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        answer = http.post(path, json=PATHS[path] | fields | {"stream": stream})
        assert (answer.status_code, answer.json()["param"]) == (400, param), answer.text
