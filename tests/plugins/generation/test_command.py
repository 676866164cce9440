"""``trunkline chat`` with piped input and scripted responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from trunkline.plugins.generation.command import chat
from trunkline.plugins.generation.conversation import ChatError, Conversation, Delta

Seen = list[dict[str, Any]]


def delta(text: str, field: str = "content") -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {field: text}}]})}\n\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """``server(*answers)`` sets the responses to all httpx clients; returns a list of the bodies that they send."""

    def start(*answers: httpx.Response | Exception) -> Seen:
        seen: Seen = []
        left: Iterator[httpx.Response | Exception] = iter(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(json.loads(request.content) | {"auth": request.headers.get("authorization")})
            reply = next(left)
            if isinstance(reply, Exception):
                raise reply
            return reply

        real = httpx.Client
        monkeypatch.setattr(httpx, "Client", lambda **options: real(transport=httpx.MockTransport(answer), **options))
        return seen

    return start


def says(*pieces: str) -> httpx.Response:
    return httpx.Response(200, text="".join(map(delta, pieces)) + "data: [DONE]\n\n")


def run(text: str | bytes, *flags: str) -> Any:
    app = typer.Typer()
    app.command()(chat)
    return CliRunner().invoke(app, list(flags), input=text)


def test_piped_lines_are_messages_of_a_conversation(server: Callable[..., Seen]) -> None:
    seen = server(says("he", "llo"), says("again"), says("fresh"))
    result = run("hi\n\nmore\n/clear\nthird\n/exit\nnever\n", "--system", "be kind", "--max-tokens", "5")
    assert result.exit_code == 0
    assert result.stdout == "hello\nagain\nfresh\n"
    assert [message["content"] for message in seen[1]["messages"]] == ["be kind", "hi", "hello", "more"]
    assert [message["content"] for message in seen[2]["messages"]] == ["be kind", "third"]
    assert seen[0]["max_tokens"] == 5
    assert "temperature" not in seen[0]
    assert seen[0]["auth"] is None


def test_the_api_key_is_sent(server: Callable[..., Seen]) -> None:
    seen = server(says("x"))
    assert run("hi\n", "--api-key", "secret").exit_code == 0
    assert seen[0]["auth"] == "Bearer secret"


def test_an_api_key_may_have_any_letters(server: Callable[..., Seen]) -> None:
    seen = server(says("x"))
    assert run("hi\n", "--api-key", "schlüssel").exit_code == 0
    assert seen[0]["auth"].encode() == "Bearer schlüssel".encode()


def test_invalid_utf8_is_replaced(server: Callable[..., Seen]) -> None:
    seen = server(says("x"))
    assert run(b"hi \xff\n").exit_code == 0
    assert seen[0]["messages"][0]["content"] == "hi \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.ConnectError("no"), "start one with `trunkline serve`"),
        (httpx.ReadError("cut"), "broke: cut"),
        (httpx.Response(400, json={"message": "too long"}), "too long (HTTP 400)"),
        (httpx.Response(404, json={"error": {"message": "no such model"}}), "no such model (HTTP 404)"),
        (httpx.Response(401, json={"error": "Unauthorized"}), "Unauthorized (HTTP 401)"),
        (httpx.Response(502, text="<html>"), "The server answered HTTP 502."),
        (httpx.Response(200, text='data: {"error": {"message": "engine gone"}}\n\n'), "engine gone"),
    ],
)
def test_a_failure_is_a_message_and_exit_status_1(
    server: Callable[..., Seen], answer: httpx.Response | Exception, message: str
) -> None:
    server(answer)
    result = run("hi\nmore\n")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_an_incomplete_answer_stays_in_the_history(server: Callable[..., Seen]) -> None:
    server(httpx.Response(200, text=delta("half") + 'data: {"error": {"message": "gone"}}\n\n'))
    with httpx.Client(base_url="http://test") as client:
        conversation = Conversation(client, system=None, options={})
        with pytest.raises(ChatError, match="gone"):
            list(conversation.send("hi"))
    assert contents(conversation.messages) == ["hi", "half"]


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_regen_answers_the_last_message_again(server: Callable[..., Seen]) -> None:
    seen = server(says("one"), says("two"), says("three"), says("four"))
    result = run("a\nb\n/regen\nc\n")
    assert result.stdout == "one\ntwo\nthree\nfour\n"
    assert contents(seen[2]["messages"]) == contents(seen[1]["messages"]) == ["a", "one", "b"]
    assert contents(seen[3]["messages"]) == ["a", "one", "b", "three", "c"]


def test_regen_without_a_new_answer_keeps_the_old_one(server: Callable[..., Seen]) -> None:
    seen = server(says("one"), httpx.Response(503, json={"message": "busy"}), says("two"))
    with httpx.Client(base_url="http://test") as client:
        conversation = Conversation(client, system=None, options={})
        list(conversation.send("a"))
        with pytest.raises(ChatError, match="busy"):
            list(conversation.regenerate())
        assert contents(conversation.messages) == ["a", "one"]
        assert list(conversation.regenerate()) == [Delta("two")]
        assert contents(conversation.messages) == ["a", "two"]
    assert contents(seen[2]["messages"]) == ["a"]


def test_regen_repeats_a_message_that_failed(server: Callable[..., Seen]) -> None:
    server(says("one"), httpx.ReadError("cut"), says("two"))
    with httpx.Client(base_url="http://test") as client:
        conversation = Conversation(client, system="s", options={})
        list(conversation.send("a"))
        with pytest.raises(ChatError, match="cut"):
            list(conversation.send("b"))
        list(conversation.regenerate())
        assert contents(conversation.messages) == ["s", "a", "one", "b", "two"]


def test_regen_needs_a_message(server: Callable[..., Seen]) -> None:
    server()
    for text in ("/regen\n", "/clear\n/regen\n"):
        result = run(text)
        assert result.exit_code == 1
        assert "There is no message to answer again." in result.stderr


def test_system_sets_and_removes_the_system_message(server: Callable[..., Seen]) -> None:
    seen = server(says("one"), says("two"), says("three"))
    assert run("a\n/system be kind\nb\n/system\nc\n", "--system", "be brief").exit_code == 0
    assert contents(seen[0]["messages"]) == ["be brief", "a"]
    assert contents(seen[1]["messages"]) == ["be kind", "a", "one", "b"]
    assert contents(seen[2]["messages"]) == ["a", "one", "b", "two", "c"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("one \\\ntwo\\\n  three\nfour\n", ["one \ntwo\n  three", "four"]),
        ('"""\none\n\n  two\n"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""\nto the end', ["to the end"]),
        ("to the end\\\n", ["to the end"]),
        ("/etc/hosts is what?\n", ["/etc/hosts is what?"]),
        ("/tmp/x\n", ["/tmp/x"]),
    ],
)
def test_messages_of_several_lines(server: Callable[..., Seen], text: str, messages: list[str]) -> None:
    seen = server(*(says("x") for _ in messages))
    assert run(text).exit_code == 0
    assert [body["messages"][-1]["content"] for body in seen] == messages


def test_help_and_unknown_commands(server: Callable[..., Seen]) -> None:
    server()
    result = run("/help\n/quit\n")
    assert result.exit_code == 1
    assert "/regen" in result.stderr
    assert "There is no command /quit" in result.stderr
    assert result.stdout == ""


def test_reasoning_is_left_out_of_pipes_and_of_later_requests(server: Callable[..., Seen]) -> None:
    thinking = delta("let me see", "reasoning_content") + delta("four") + "data: [DONE]\n\n"
    seen = server(httpx.Response(200, text=thinking), says("x"))
    assert run("2 + 2?\nsure?\n").stdout == "four\nx\n"
    assert contents(seen[1]["messages"]) == ["2 + 2?", "four", "sure?"]
