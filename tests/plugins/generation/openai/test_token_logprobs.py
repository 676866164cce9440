"""Log-probabilities in OpenAI's layouts: whole, echoed, streamed in any grouping of the tokens."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest

from tests.plugins.generation.openai.requests import CHAT, USER, chat, chunks_of, complete
from trunkline.plugins.generation.openai.chat_replies import ChatReplies
from trunkline.plugins.generation.openai.replies import finish_fields
from trunkline.plugins.generation.openai.token_logprobs import LOWEST, ChatLogprobs, CompletionLogprobs
from trunkline.plugins.generation.schemas import GenerationResult, LogprobTable

END = {"type": "length", "length": 1}
ABORT = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture(autouse=True)
def results(engine: Any) -> None:
    engine.with_results = True


def choices(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


async def completion(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    [choice] = choices(await complete(client, **body))
    return choice


async def test_chat(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    ids = byte_level.encode(" fox é", add_special_tokens=False)
    engine.script = lambda item: [*ids, END]
    [choice] = choices(await chat(client, logprobs=True, top_logprobs=2))
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"] == " fox é"
    assert [entry["logprob"] for entry in content] == [-token / 64 for token in ids]
    for token, entry in zip(ids, content, strict=True):
        first, second = [token, 1] if token % 2 == 0 else [1, 2]
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-first / 64, -second / 64]
        assert entry["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}
    assert choice["logprobs"]["refusal"] is None


@pytest.mark.parametrize(("body", "count"), [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 0}, 0)])
async def test_chat_without_top(client: httpx.AsyncClient, engine: Any, body: dict[str, Any], count: int) -> None:
    engine.says("fox")
    [choice] = choices(await chat(client, **body))
    assert {len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]} == {count}


async def test_parts_of_characters(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    text = "é🙂\N{GREEK SMALL LETTER OMEGA}!"
    ids = byte_level.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # some tokens are parts of characters
    engine.script = lambda item: [*ids, END]
    choice = await completion(client, logprobs=1)
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    partial = [name for name in names if name.startswith("bytes:\\x")]
    assert partial
    assert "�" not in "".join(names)
    # A part has the offset of its character; the rest of the text is that of the tokens.
    assert [text[offset] for offset, name in zip(offsets, names, strict=True) if name not in partial] == [
        name[0] for name in names if name not in partial
    ]
    assert offsets == sorted(offsets)
    assert max(offsets) == len(text) - 1
    [chatted] = choices(await chat(client, logprobs=True))
    content = chatted["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [name.removeprefix("bytes:") for name in names]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
async def test_echo(request: Any, make_engine: Any, make_app: Any, kind: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    engine = make_engine(tokenizer)
    engine.with_results = True
    ids = tokenizer.encode("world fox", add_special_tokens=False)
    engine.script = lambda item: [*ids, END]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as client:
        choice = await completion(client, prompt="hello né", echo=True, logprobs=1)
        by_ids = await completion(client, prompt=engine.items[0].prompt, echo=True, logprobs=1)
    logprobs, prompt = choice["logprobs"], engine.items[0].prompt
    tokens = [*prompt, *ids]
    assert choice["text"].startswith("hello né")
    assert by_ids == choice
    assert logprobs["token_logprobs"] == [None, *(-token / 64 for token in tokens[1:])]
    assert logprobs["top_logprobs"][0] is None
    for token, top in zip(tokens[1:], logprobs["top_logprobs"][1:], strict=True):
        assert list(top.values()) == ([-token / 64] if token in (1,) or token % 2 == 0 else [-1 / 64, -token / 64])
    for name, (start, end) in zip(
        logprobs["tokens"], pairwise([*logprobs["text_offset"], len(choice["text"])]), strict=True
    ):
        assert choice["text"][start:end].strip() == name.strip() or name.startswith("bytes:")


async def test_what_the_text_leaves_out_has_entries(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    end = byte_level.eos_token_id
    ids = [*byte_level.encode("fox", add_special_tokens=False), end]
    engine.script = lambda item: [*ids, {"type": "stop", "matched": end}]
    choice = await completion(client, logprobs=0)
    assert choice["text"] == "fox"
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert choice["logprobs"]["text_offset"][-1] == 3
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[n] for n in choice["logprobs"]["tokens"]]


async def test_tokens_as_ids(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [5, 7, END]
    choice = await completion(client, logprobs=1, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:7"]
    assert choice["logprobs"]["top_logprobs"][0] == {"token_id:1": -1 / 64, "token_id:5": -5 / 64}
    [chatted] = choices(await chat(client, logprobs=True, return_tokens_as_token_ids=True))
    assert [entry["token"] for entry in chatted["logprobs"]["content"]] == ["token_id:5", "token_id:7"]


async def test_no_log_probabilities_are_requested_of_the_engine_without_need(
    client: httpx.AsyncClient, engine: Any
) -> None:
    choices(await complete(client, echo=True))
    choices(await chat(client, logprobs=False))
    assert [item.params.logprobs for item in engine.items] == [None, None]


# -- readers ---------------------------------------------------------------------------------


def table(chosen: list[float], top_ids: list[int], top: list[float], sampled: Any = ()) -> LogprobTable:
    floats, integers = ((lambda values, kind=kind: np.array(values, kind).tobytes()) for kind in ("<f4", "<i4"))
    return LogprobTable(floats(chosen), integers(top_ids), floats(top), b"", integers(sampled))


def loaded(reader: Any) -> dict[str, Any]:
    return dict(json.loads(json.dumps({name: json.loads(bytes(raw)) for name, raw in reader.take().items() if raw})))


def completion_reader(tokenizer: Any, prompt: list[int], start: int | None) -> CompletionLogprobs:
    return CompletionLogprobs(
        prompt, start, tokenizer, names=True, output=True, skip_special_tokens=True, prompt_length=100
    )


def test_a_restart_drops_what_came_of_the_prompt(byte_level: Any) -> None:
    reader = completion_reader(byte_level, [5, 6, 7], 0)
    reader.add_prompt(GenerationResult(prompt=table([-1.0], [1], [-0.5]), first=1))
    reader.add(GenerationResult(prompt=table([-2.0, -3.0], [1, 1], [-0.5, -0.5]), first=1, restart=True))
    reader.add(GenerationResult(output=table([-4.0], [1], [-0.5], [8])))
    assert loaded(reader)["token_logprobs"] == [None, -2.0, -3.0, -4.0]
    assert reader.take() is None


def test_values_that_json_has_not(byte_level: Any) -> None:
    reader = ChatLogprobs([5], None, byte_level, names=True)
    reader.add(GenerationResult(output=table([float("-inf")], [1, 2], [-0.5, float("nan")], [8])))
    [entry] = loaded(reader)["content"]
    assert entry["logprob"] == entry["top_logprobs"][1]["logprob"] == LOWEST


def test_equal_texts_keep_the_likeliest(byte_level: Any) -> None:
    reader = CompletionLogprobs(
        [5], None, byte_level, names=False, output=True, skip_special_tokens=True, prompt_length=0
    )
    unknown = len(byte_level) + 1  # these ids have no text
    reader.add(GenerationResult(output=table([-3.0], [unknown, unknown + 1], [-1.0, -2.0], [unknown + 2])))
    assert loaded(reader)["top_logprobs"] == [{"": -1.0}]


# -- streams ---------------------------------------------------------------------------------


def joined(choices: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """The choice that the chunks of a stream make together."""
    made: dict[str, Any] = {"text": "", "token_ids": [], "finish": [], "logprobs": {}}
    for choice in choices:
        made["text"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        made["token_ids"] += choice.get("token_ids", [])
        made["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        for name, entries in (choice["logprobs"] or {}).items():
            if entries is not None:
                made["logprobs"].setdefault(name, []).extend(entries)
    return made


def as_joined(choice: dict[str, Any]) -> dict[str, Any]:
    """The same of a choice of a reply."""
    logprobs = {name: entries for name, entries in choice["logprobs"].items() if entries is not None}
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return {
        "text": text,
        "token_ids": choice["token_ids"],
        "finish": [choice["finish_reason"]],
        "logprobs": logprobs,
    }


class Grouped:
    """Gives a reply its tokens in random groups, and lets the engine run ahead of a slow reader at random times."""

    def __init__(self, engine: Any, ids: list[int], finish: dict[str, Any], seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = engine
        self.ids = ids
        self.finish = finish

    async def play(self, reply: Any) -> None:
        """Replaces ``FakeEngine._play``."""
        if reply.item.params.max_new_tokens == 0:
            reply.add(finish={"type": "length", "length": 0})
            return
        rest = list(self.ids)
        while rest:
            size = self.random.choice([1, 1, 2, 3, len(rest)])
            group, rest = rest[:size], rest[size:]
            for _ in range(self.random.choice([0, 1, 5])):
                await pause()
            reply.add(*group, finish=None if rest or self.finish is ABORT else self.finish)
        await pause()
        reply.add(finish=self.finish)


async def pause() -> None:
    await asyncio.sleep(0)


async def stream_of(app: Any, path: str, body: dict[str, Any], chooser: random.Random) -> list[dict[str, Any]]:
    """The chunks of a stream whose reader is slow at random."""
    frames: list[bytes] = []
    content = json.dumps(body | {"stream": True}).encode()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            frames.append(message["body"])
            for _ in range(chooser.choice([0, 0, 1, 12])):
                await pause()

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("test", 80), "extensions": {},
    }  # fmt: skip
    await app(scope, receive, send)
    text = b"".join(frames).decode()
    assert text.endswith("data: [DONE]\n\n")
    return chunks_of(text)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"stop": ["xyz", "o x"]},
    {"skip_special_tokens": False},
    {"return_tokens_as_token_ids": True},
]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2, "max_tokens": 30}),
    ("/v1/completions", {"prompt": "hello é", "logprobs": 2, "echo": True, "max_tokens": 30}),
    ("/v1/completions", {"prompt": ["hello", "naïve fox"], "logprobs": 0, "max_tokens": 30}),
    ("/v1/completions", {"prompt": [[70, 5], [6]], "logprobs": 1, "echo": True, "max_tokens": 0}),
]


async def check_streams(engine: Any, app: Any, byte_level: Any, path: str, body: dict[str, Any], seed: int) -> None:
    """A stream's chunks together are the reply, for one random output in one random grouping."""
    chooser = random.Random(seed)
    text = "".join(chooser.choices(["fox", " ", "é", "🙂", "xy", "z", "<|im_start|>", "中"], k=chooser.randrange(9)))
    ids = byte_level.encode(text, add_special_tokens=False)
    ids += [chooser.randrange(len(byte_level)) for _ in range(chooser.randrange(4))]  # not always text
    finish = chooser.choice([END, ABORT, {"type": "stop", "matched": ids[-1]} if ids else END])
    body = body | chooser.choice(OPTIONS) | {"return_token_ids": True}
    engine._play = Grouped(engine, ids, finish, seed).play
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        whole = choices(await client.post(path, json=body))
    chunks = [choice for chunk in await stream_of(app, path, body, chooser) for choice in chunk["choices"]]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        choice.setdefault("token_ids", [])
        choice["logprobs"] = choice["logprobs"] or {}
        assert joined(own, path) == as_joined(choice), (body, text, seed)


async def check_all(engine: Any, app: Any, byte_level: Any, path: str, body: dict[str, Any]) -> None:
    for seed in range(60):
        await check_streams(engine, app, byte_level, path, body, seed)


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_a_stream_is_the_reply_in_parts(
    engine: Any, make_app: Callable[..., Any], byte_level: Any, path: str, body: dict[str, Any]
) -> None:
    await check_all(engine, make_app(engine), byte_level, path, body)


def eager(self: ChatReplies, index: int, unsent: Any) -> Iterator[dict[str, Any]]:
    """A seeded defect: looks whether the sequence has ended after its last chunk was sent, not before."""
    if text := unsent.text():
        yield {"delta": {"content": text}, **unsent.token_fields()}
    if unsent.sequence.finished:
        yield {"delta": {}, **unsent.token_fields(), **finish_fields(unsent.sequence)}


async def test_the_property_test_finds_streams_that_end_twice(
    engine: Any, make_app: Callable[..., Any], byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatReplies, "next_choices", eager)
    with pytest.raises(AssertionError):
        await check_all(engine, make_app(engine), byte_level, *REQUESTS[0])
