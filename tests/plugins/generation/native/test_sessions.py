"""Sessions, against a simple model of SGLang's rules, and their limits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.core.errors import RequestError
from trunkline.core.types import ModelInfo, ServedModel
from trunkline.plugins.generation.native import session_prompts as prompts_module
from trunkline.plugins.generation.native import sessions as module
from trunkline.plugins.generation.native.body_schemas import SessionParams
from trunkline.plugins.generation.native.session_prompts import SessionPrompts
from trunkline.plugins.generation.native.sessions import Sessions

BOS = 1
ABORTED = {"type": "abort", "message": "Aborted"}


def served(name: str = "m", *aliases: str) -> ServedModel:
    info = ModelInfo(
        path="", architecture="L", model_type="l", context_length=9, vocab_size=9, hidden_size=9, causal=True
    )
    return ServedModel(
        name=name, aliases=aliases, model_path=name, tokenizer_path=name, info=info, tasks={"generation": True},
        max_total_tokens=9, max_running_requests=9, dtype="float32", attention_backend="cpu",
    )  # fmt: skip


class Reply:
    """The attributes of a reply that sessions use."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.tokens: list[int] = []
        self.finish: dict[str, Any] | None = None
        self.error: RequestError | None = None
        self._ended = asyncio.Event()

    def end(self, finish: dict[str, Any] | None = None, error: RequestError | None = None) -> None:
        if self.finish is None and self.error is None:
            self.finish, self.error = finish, error
            self._ended.set()

    def cancel(self) -> None:
        self.end(ABORTED)

    async def result(self) -> None:
        await self._ended.wait()
        if self.error is not None:
            raise self.error


def send(
    sessions: Sessions, rid: str, ids: list[int], model: ServedModel | None = None, /, **params: Any
) -> tuple[list[int], Reply]:
    """Restore the prompt of a request, submit it, and add it to its session; returns prompt and reply."""
    session_params = SessionParams(**{"id": "s"} | params)
    prompts = SessionPrompts(sessions, [session_params], model or served())
    [prompt] = prompts.restore([ids], BOS, "input_ids", single=True)
    prompts.check_unchanged()
    reply: Any = Reply(rid)
    prompts.add_requests([reply])
    return prompt, reply


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


# -- the rules -------------------------------------------------------------------------------


@dataclass(eq=False)
class ModelRequest:
    """A request in the simple model."""

    ids: list[int]
    output: list[int] = field(default_factory=list)
    state: str = "running"  # or "done", "aborted"
    children: list[ModelRequest] = field(default_factory=list)


class Model:
    """SGLang's rules in their simplest form, with a dictionary of requests and lists of children."""

    def __init__(self, streaming: bool) -> None:
        self.streaming = streaming
        self.known: dict[str, ModelRequest] = {}
        self.busy: ModelRequest | None = None

    def send(self, rid: str, ids: list[int], p: SessionParams) -> tuple[ModelRequest | None, str]:
        """The new request and "", or None and the error's message."""
        parent: ModelRequest | None = None
        if self.streaming:
            if self.busy is not None:
                return None, "Streaming session already has an active request."
            for name in ("replace", "drop_previous_output", "offset"):
                if getattr(p, name):
                    return None, f"Streaming sessions do not support {name}."
            parent = next(iter(self.known.values()), None)
        elif p.rid is not None:
            if p.rid not in self.known:
                return None, "Invalid request session id"
            parent = self.known[p.rid]
            if not p.replace and parent.state == "running":
                return None, "Session request is appending to a request that hasn't finished."
        whole = ids
        if parent is not None:
            history = parent.ids if p.drop_previous_output else parent.ids + parent.output
            if p.offset:
                history = history[: p.offset]
            whole = history + (ids[1:] if ids and ids[0] == BOS else ids)
        if not whole:
            return None, "A session request must contain input tokens after restoring history."
        new = ModelRequest(list(whole))
        if self.streaming:
            self.busy = new
            return new, ""
        if p.replace and parent is None:
            for past in list(self.known.values()):
                self.forget(past)
        elif p.replace and parent is not None:
            self.abort(parent)
            for child in parent.children:
                self.forget(child)
            parent.children = []
        self.known[rid] = new
        if parent is not None:
            parent.children.append(new)
        return new, ""

    def forget(self, past: ModelRequest) -> None:
        self.abort(past)
        for child in past.children:
            self.forget(child)
        self.known = {rid: other for rid, other in self.known.items() if other is not past}

    @staticmethod
    def abort(past: ModelRequest) -> None:
        if past.state == "running":
            past.state = "aborted"

    def end(self, rid: str, past: ModelRequest, how: str) -> None:
        if past.state == "running":
            past.state = how
        if past is self.busy:
            self.busy = None
            if how == "done":
                self.known = {rid: past}


RIDS = st.sampled_from("abcde")
IDS = st.lists(st.integers(1, 4), max_size=3)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "rid": RIDS,
        "replace": st.booleans(),
        "drop_previous_output": st.booleans(),
        "offset": st.integers(-2, 6),
    },
)
STEP = st.one_of(
    st.tuples(st.just("send"), RIDS, IDS, PARAMS),
    st.tuples(st.just("token"), st.integers(0, 9)),
    st.tuples(st.sampled_from(["done", "aborted", "failed"]), st.integers(0, 9)),
)


async def compare(streaming: bool, steps: list[Any]) -> None:
    sessions, plain = Sessions(), Model(streaming)
    sessions.open("s", streaming=streaming)
    running: list[tuple[str, Reply, ModelRequest]] = []
    everything: list[tuple[Reply, ModelRequest]] = []
    for step in steps:
        if step[0] == "send":
            _, rid, ids, params = step
            if rid in {live for live, _, _ in running}:
                continue  # the server refuses a second request with the id of a running one
            expected, message = plain.send(rid, ids, SessionParams(id="s", **params))
            if expected is None:
                with pytest.raises(RequestError, match=f"^{re.escape(message)}$") as caught:
                    send(sessions, rid, ids, **params)
                assert caught.value.status == 400
            else:
                prompt, reply = send(sessions, rid, ids, **params)
                assert prompt == expected.ids
                running.append((rid, reply, expected))
                everything.append((reply, expected))
        elif running:
            rid, reply, past = running[step[1] % len(running)]
            if step[0] == "token":
                if past.state == "running":
                    reply.tokens.append(7)
                    past.output.append(7)
            else:
                failure = RequestError("down", status=503) if step[0] == "failed" else None
                reply.end(None if failure else {"type": "stop"} if step[0] == "done" else ABORTED, failure)
                plain.end(rid, past, "done" if step[0] == "done" else "aborted")
        await settle()
        for reply, past in everything:
            assert (reply.finish is None and reply.error is None) == (past.state == "running")
        running = [entry for entry in running if entry[2].state == "running"]
        own = sessions.get("s")
        assert own.running == len(running)
        assert own.by_rid.keys() == plain.known.keys()
        assert own.tokens == sum(node.size for node in own.nodes)
    for _, reply, _ in running:
        reply.cancel()
    await settle()
    assert sessions.get("s").running == 0


@settings(max_examples=300)
@given(st.booleans(), st.lists(STEP, max_size=14))
def test_sessions_follow_sglangs_rules(streaming: bool, steps: list[Any]) -> None:
    asyncio.run(compare(streaming, steps))


BUG = [
    ("send", "a", [2], {}),
    ("done", 0),
    ("send", "b", [3], {"rid": "a"}),
    ("send", "c", [4], {"rid": "a", "replace": True}),
]


def test_a_replacement_that_keeps_descendants_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(compare(False, BUG))
    monkeypatch.setattr(module.Node, "descendants", lambda self: iter(()))
    with pytest.raises(AssertionError):
        asyncio.run(compare(False, BUG))


# -- limits ----------------------------------------------------------------------------------


async def test_opening_and_closing() -> None:
    sessions = Sessions()
    assert sessions.open("s") == "s"
    with pytest.raises(
        RequestError, match=r"Failed to open the session\. Check if a session with the same id is still"
    ):
        sessions.open("s")
    names = {sessions.open(None), sessions.open(None)}
    assert len(names) == 2
    sessions.close("s")
    sessions.close("s")
    with pytest.raises(RequestError, match="Invalid request: session id s does not exist"):
        sessions.get("s")


async def test_idle_sessions_are_closed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    sessions = Sessions()
    sessions.open("s", idle_timeout=10)
    sessions.open("default")
    _, reply = send(sessions, "a", [2])
    now += 60
    assert sessions.get("s").running == 1
    reply.end({"type": "stop"})
    await settle()
    now += 9
    assert sessions.get("s").nodes
    now += 2
    with pytest.raises(RequestError, match="does not exist"):
        sessions.get("s")
    assert sessions.open("s") == "s", "the name of an expired session can be used again"
    assert not sessions.get("s").nodes
    assert len(sessions) == 2


async def test_expired_sessions_are_closed_though_no_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLEANUP_SECONDS", 0.01)
    sessions = Sessions()
    sessions.open("long", idle_timeout=0.2)
    sessions.open("short", idle_timeout=0.05)
    for left in (1, 0):
        while len(sessions) > left:
            await asyncio.sleep(0.01)
    sessions.open("later", idle_timeout=0.05)
    while len(sessions):
        await asyncio.sleep(0.01)


async def test_beyond_the_limit_the_session_that_was_idle_for_longest_is_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 3)
    sessions = Sessions()
    for name in ("s", "t", "u"):
        sessions.open(name)
    _, first = send(sessions, "a", [2])
    send(sessions, "b", [2], id="u")
    sessions.open("v")
    assert "'t' is closed to make room" in caplog.text
    send(sessions, "c", [2], id="v")
    with pytest.raises(RequestError, match="3 sessions are open") as caught:
        sessions.open("w")
    assert caught.value.status == 503
    first.end({"type": "stop"})
    await settle()
    sessions.open("w")
    with pytest.raises(RequestError, match="session id s does not exist"):
        sessions.get("s")


async def test_the_number_of_requests_in_a_session_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MAX_NODES", 3)
    sessions = Sessions()
    sessions.open("s")
    for _ in range(3):
        send(sessions, "same", [2])
    with pytest.raises(RequestError, match="may have 3 requests; it has 3, and this batch adds") as caught:
        send(sessions, "d", [2])
    assert caught.value.status == 400
    _, reply = send(sessions, "d", [2], replace=True)
    assert len(sessions.get("s").nodes) == 1
    sessions.open("t", streaming=True)
    for _ in range(9):
        _, reply = send(sessions, "e", [2], id="t")
        reply.end({"type": "stop"})
        await settle()
    assert len(sessions.get("t").nodes) == 1
    assert sessions.get("t").tokens == 9


async def test_the_tokens_of_all_sessions_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 10)
    sessions = Sessions()
    for name in ("s", "t"):
        sessions.open(name)
        _, reply = send(sessions, "a", [2, 2], id=name)
        reply.tokens += [3, 3]
        reply.end({"type": "stop"})
        await settle()
    prompt, reply = send(sessions, "b", [2], rid="a", id="t")
    assert len(prompt) == 5
    assert len(sessions) == 1
    assert sessions.get("t").tokens == 9
    with pytest.raises(RequestError, match=r"as many tokens as they may \(10\)") as caught:
        send(sessions, "c", [2, 2], id="t")
    assert caught.value.status == 503
    reply.end({"type": "stop"})


async def test_output_is_copied_from_a_reply_that_has_ended() -> None:
    sessions = Sessions()
    sessions.open("s")
    _, reply = send(sessions, "a", [2])
    reply.tokens.append(5)
    reply.end({"type": "stop"})
    await settle()
    assert sessions.get("s").by_rid["a"]._reply is None
    reply.tokens.clear()
    assert send(sessions, "b", [3], rid="a")[0] == [2, 5, 3]


async def test_a_session_belongs_to_a_model_under_all_its_names() -> None:
    sessions = Sessions()
    sessions.open("s")
    send(sessions, "a", [2])[1].end({"type": "stop"})
    with pytest.raises(RequestError, match="has tokens of the model 'm'; open another one for 'other'"):
        send(sessions, "b", [2], served("other"))
    send(sessions, "b", [2], served("new", "m"))
    send(sessions, "c", [2], served("newer", "m", "new"))


async def test_a_change_between_restoring_and_submitting_is_detected() -> None:
    sessions = Sessions()
    sessions.open("s")
    _, reply = send(sessions, "a", [2])
    reply.end({"type": "stop"})
    await settle()
    late = SessionPrompts(sessions, [SessionParams(id="s", rid="a")], served())
    late.restore([[3]], BOS, "input_ids", single=True)
    send(sessions, "a", [4], rid="a")[1].end({"type": "stop"})
    with pytest.raises(RequestError, match="The session 's' was changed by another request; send this one again"):
        late.check_unchanged()
    gone = SessionPrompts(sessions, [SessionParams(id="s")], served())
    gone.restore([[3]], BOS, "input_ids", single=True)
    sessions.close("s")
    sessions.open("s")
    with pytest.raises(RequestError, match="was changed"):
        gone.check_unchanged()


async def test_a_batch_that_replaces_requests_has_only_one_prompt_of_the_session() -> None:
    sessions = Sessions()
    sessions.open("s")
    sessions.open("t", streaming=True)
    for params, message in (
        ([{}, {"replace": True}], "must be the only one of that session"),
        ([{"replace": True}, {}], "must be the only one of that session"),
        ([{"id": "t"}, {"id": "t"}], "already has an active request"),
    ):
        prompts = SessionPrompts(sessions, [SessionParams(**{"id": "s"} | each) for each in params], served())
        with pytest.raises(RequestError, match=rf"^text\[1\]: .*{message}"):
            prompts.restore([[2], [2]], BOS, "text", single=False)


# -- over HTTP, with a scripted engine -------------------------------------------------------


async def opened(client: httpx.AsyncClient, **body: Any) -> str:
    answer = await client.post("/open_session", json={"capacity_of_str_len": 1000, **body})
    assert answer.status_code == 200, answer.text
    name: str = answer.json()
    return name


async def test_each_prompt_of_a_batch_continues_a_request(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [9, {"type": "length", "length": 1}]
    name = await opened(client)
    both: dict[str, Any] = {"input_ids": [[5], [6]], "session_params": {"id": name}, "rid": "r"}
    assert (await client.post("/generate", json=both)).status_code == 200
    later = [{"id": name, "rid": "r_0"}, {"id": name, "rid": "r_1", "drop_previous_output": True}]
    both |= {"input_ids": [[7], [8]], "session_params": later, "rid": "q", "return_prompt_token_ids": True}
    records = (await client.post("/generate", json=both)).json()
    assert [record["prompt_token_ids"] for record in records] == [[5, 9, 7], [6, 8]]


async def test_a_failed_submission_leaves_the_session_as_it_was(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [9, {"type": "length", "length": 1}]
    name = await opened(client)
    body: dict[str, Any] = {"input_ids": [5], "session_params": {"id": name}, "rid": "r"}
    assert (await client.post("/generate", json=body)).status_code == 200
    engine.refuse = RequestError("full", status=503)
    replacing = body | {"session_params": {"id": name, "replace": True}}
    assert (await client.post("/generate", json=replacing)).status_code == 503
    engine.refuse = None
    body |= {"session_params": {"id": name, "rid": "r"}, "rid": "q", "return_prompt_token_ids": True}
    assert (await client.post("/generate", json=body)).json()["prompt_token_ids"] == [5, 9, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session_params": {"id": "nobody"}}, "input_ids: Invalid request: session id nobody does not exist"),
        ({"session_params": {"id": "s", "rid": "r"}}, "Invalid request session id"),
        ({"session_params": {"rid": "r"}}, "session_params needs the id of a session, for each prompt."),
        ({"session_params": [{"id": "s"}]}, "session_params should be an object for a single request."),
        ({"session_id": "x"}, "session_id and session_params cannot both be set."),
        ({"sampling_params": {"n": 2}}, "A prompt of a session can't be sampled n > 1 times; send it n times."),
        ({"input_ids": [[5], [6]], "session_params": [{"id": "s"}]}, "The length of session_params should be equal to"),
        ({"input_ids": [[5], [6]], "session_params": [{"id": "s"}, None]}, "session_params needs the id of a session"),
        ({"input_ids": []}, "A session request must contain input tokens after restoring history."),
        ({"input_ids": None, "input_embeds": [[1.0]]}, "input_embeds can't continue a session"),
        ({"input_ids": [100_000]}, "The input_ids contains values greater than the vocab size ("),
    ],
)
async def test_invalid_session_params(
    client: httpx.AsyncClient, engine: Any, changes: dict[str, Any], message: str
) -> None:
    await opened(client, session_id="s")
    body = {"input_ids": [5], "session_params": {"id": "s"}} | changes
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message.removeprefix("input_ids: "))
    assert engine.items == []


@pytest.mark.parametrize("params", [{}, {"id": None}, None, {"id": None, "rid": None, "offset": None}])
async def test_params_without_a_session(client: httpx.AsyncClient, engine: Any, params: Any) -> None:
    for body in ({"text": "a"}, {"text": ["a", "b"]}):
        answer = await client.post("/generate", json={**body, "session_params": params, "session_id": None})
        assert answer.status_code == 200
    assert (await client.post("/generate", json={"text": "a", "session_id": "x"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/open_session", {}),
        ("/open_session", {"capacity_of_str_len": "many"}),
        ("/open_session", {"capacity_of_str_len": 1, "session_id": ""}),
        ("/open_session", {"capacity_of_str_len": 1, "timeout": -1}),
        ("/open_session", {"capacity_of_str_len": 1, "timeout": 1e9}),
        ("/close_session", {}),
        ("/generate", {"text": "a", "session_params": {"id": "s", "replce": True}}),
    ],
)
async def test_invalid_bodies(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")


async def test_the_length_limit_includes_the_history(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [{"type": "length", "length": 0}]
    await opened(client, session_id="s")
    body: dict[str, Any] = {"input_ids": [5] * 60, "session_params": {"id": "s"}, "rid": "r"}
    assert (await client.post("/generate", json=body)).status_code == 200
    again = body | {"session_params": {"id": "s", "rid": "r"}, "rid": "q"}
    answer = (await client.post("/generate", json=again)).json()
    assert answer["error"]["message"].startswith("The input (120 tokens) is longer")


async def test_a_continued_text_has_no_second_bos(
    make_engine: Callable[..., Any], make_app: Callable[..., Any]
) -> None:
    class Tokenizer:
        bos_token_id = BOS
        eos_token_id = 2
        chat_template = None
        all_special_ids = (BOS,)

        def __len__(self) -> int:
            return 100

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [BOS] * add_special_tokens + [ord(character) % 100 for character in text]

        def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
            return "".join(map(chr, ids))

    engine = make_engine(Tokenizer())
    engine.script = lambda item: [9, {"type": "length", "length": 1}]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://t") as client:
        await opened(client, session_id="s")
        first: dict[str, Any] = {"text": "a", "session_params": {"id": "s"}, "rid": "r"}
        await client.post("/generate", json=first)
        await client.post("/generate", json=first | {"session_params": {"id": "s", "rid": "r"}, "rid": "q"})
        await client.post("/generate", json={"text": "", "session_params": {"id": "s", "rid": "q"}})
    assert [item.prompt for item in engine.items] == [[BOS, 97], [BOS, 97, 9, 97], [BOS, 97, 9, 97, 9]]
