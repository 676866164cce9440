"""A run over a file of requests, on an app without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar, Request, Response, get, post

from trunkline.core.batch_file.answers import AnswerFile
from trunkline.core.batch_file.runner import BatchRunner, request_paths
from trunkline.core.errors import TrunklineError

Handler = Callable[[Any], Any]


class App:
    """An app with the route ``/echo``; ``statuses``: those that it gives first, by text. ``seen``: all requests."""

    def __init__(self, statuses: dict[str, list[int]] | None = None) -> None:
        self.seen: list[str] = []
        self.running = self.most = 0
        self.keys: set[str | None] = set()
        self._statuses = statuses or {}
        infer: dict[str, Any] = {"scope": "infer", "body": dict}

        @post("/echo", opt=infer, status_code=200)
        async def echo(request: Request[Any, Any, Any]) -> Response[Any]:
            return await self._answer(request)

        @post("/admin", opt={"scope": "admin", "body": dict})
        async def admin() -> None: ...

        @get("/only-get", opt=infer)
        async def only_get() -> None: ...

        @post("/no-body", opt={"scope": "infer"})
        async def no_body() -> None: ...

        self.app = Litestar([echo, admin, only_get, no_body])

    async def _answer(self, request: Request[Any, Any, Any]) -> Response[Any]:
        text = (await request.json())["text"]
        self.seen.append(text)
        self.keys.add(request.headers.get("authorization"))
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(5):
            await asyncio.sleep(0)
        self.running -= 1
        if text == "hang":
            await asyncio.Event().wait()
        if text == "broken":
            raise ValueError("a bug")
        left = self._statuses.get(text)
        status = left.pop(0) if left else 200
        headers = {"x-request-id": f"id of {text}", "retry-after": "0"}
        return Response({"echo": text}, status_code=status, headers=headers)


def requests(path: Path, *texts: str) -> Path:
    lines = [
        json.dumps({"custom_id": text, "method": "POST", "url": "/echo", "body": {"text": text}}) for text in texts
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


async def run(app: App, source: Path, **options: Any) -> list[dict[str, Any]]:
    """The answers after a run."""
    output = source.parent / "out"
    with AnswerFile(output) as answers:
        await BatchRunner(app.app, source, answers, **{"concurrency": 4, **options}).run()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_paths_are_those_that_take_a_body_by_post() -> None:
    assert request_paths(App().app) == {"/echo"}


async def test_every_request_is_answered_once(tmp_path: Path) -> None:
    app, reports = App(), []
    texts = [f"text {index}" for index in range(50)]
    answers = await run(app, requests(tmp_path / "in", *texts), report=lambda: reports.append(1), api_key="secret")
    assert sorted(app.seen) == sorted(texts) == sorted(answer["custom_id"] for answer in answers)
    for answer in answers:
        text = answer["custom_id"]
        assert answer["error"] is None
        assert answer["response"] == {"status_code": 200, "request_id": f"id of {text}", "body": {"echo": text}}
    assert len({answer["id"] for answer in answers}) == len(reports) == 50
    assert app.keys == {"Bearer secret"}
    assert app.most == 4


async def test_lines_that_cant_be_run_are_answered_with_errors(tmp_path: Path) -> None:
    source = requests(tmp_path / "in", "a", "b", "a")
    source.write_text("{bad\n\n" + source.read_text())
    answers = await run(App(), source)
    errors = {answer["error"]["line"]: answer["error"]["code"] for answer in answers if answer["error"]}
    assert errors == {1: "invalid_json_line", 5: "duplicate_custom_id"}
    assert len(answers) == 4


async def test_a_second_run_answers_the_rest_only(tmp_path: Path) -> None:
    source = requests(tmp_path / "in", "a", "b", "a", "c")
    source.write_text("{bad\n" + source.read_text())
    first = await run(App(), source)
    (tmp_path / "out").write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in first[:3]))
    kept = [one["custom_id"] for one in first[:3]]
    again = App()
    answers = await run(again, source)
    assert answers[:3] == first[:3]
    assert sorted(again.seen) == sorted({"a", "b", "c"} - set(kept[1:]))
    assert sorted(str(one["custom_id"]) for one in answers) == ["None", "a", "a", "b", "c"]
    unused = App()
    assert await run(unused, source) == answers
    assert unused.seen == []


async def test_requests_are_repeated_while_the_server_is_busy(tmp_path: Path) -> None:
    app = App({"a": [503, 429, 503], "b": [503] * 99, "c": [400], "d": [500]})
    answers = await run(app, requests(tmp_path / "in", "a", "b", "c", "d"))
    statuses = {answer["custom_id"]: answer["response"]["status_code"] for answer in answers}
    assert statuses == {"a": 200, "b": 503, "c": 400, "d": 500}
    assert [app.seen.count(text) for text in "abcd"] == [4, 20, 1, 1]


async def test_a_handler_that_fails_ends_its_request_only(tmp_path: Path) -> None:
    answers = await run(App(), requests(tmp_path / "in", "broken", "a"))
    statuses = {answer["custom_id"]: answer["response"]["status_code"] for answer in answers}
    assert statuses == {"broken": 500, "a": 200}


async def test_requests_that_are_cancelled_have_no_answer(tmp_path: Path) -> None:
    source = requests(tmp_path / "in", "a", "hang", "b")
    app = App()
    running = asyncio.create_task(run(app, source, concurrency=1))
    while "hang" not in app.seen:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [json.loads(line)["custom_id"] for line in (tmp_path / "out").read_text().splitlines()] == ["a"]
    assert app.seen == ["a", "hang"]


async def test_a_full_disk_ends_the_run_with_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(self: AnswerFile, answer: Any) -> None:
        raise TrunklineError("Can't write")

    monkeypatch.setattr(AnswerFile, "append", append)
    with pytest.raises(TrunklineError, match="Can't write"):
        await run(App(), requests(tmp_path / "in", "a", "b", "c"))
