"""SGLang's three routes and the live views, over a real engine in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from trunkline.core import Engine
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.moe_stats import live_routes, offline, trunkline_routes
from trunkline.plugins.moe_stats.recorder import Recorder

START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))
TEXTS = {
    START: "Start recording the expert distribution.\n",
    STOP: "Stop recording the expert distribution.\n",
    DUMP: "Dump expert distribution record.\n",
}


def files(engine: Engine) -> set[Path]:
    observers = engine.client.transport.loop.lanes[0].model.expert_observers
    [settings] = {observer._settings for observer in observers if isinstance(observer, Recorder)}
    return set(Path(settings.expert_dump_dir).glob("*.pt"))


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("body", [b"", b"{}", b"not json"])
async def test_sglangs_answers(client: httpx.AsyncClient, shared: Engine, method: str, body: bytes) -> None:
    before = files(shared)
    for path, text in TEXTS.items():
        answer = await client.request(method, path, content=body)
        assert (answer.status_code, answer.text) == (200, text)
        assert answer.headers["content-type"].startswith("text/plain")
    assert len(files(shared) - before) == 1


@pytest.mark.parametrize("how", [{"params": {"format": "json"}}, {"headers": {"accept": "application/json"}}])
async def test_json_on_request(client: httpx.AsyncClient, shared: Engine, how: dict[str, Any]) -> None:
    assert shared.call("flush_cache")  # or a prefix might stand in for tokens
    assert (await client.post(START, **how)).json()["recording"] is True
    generate(shared, [[5, 6, 7]], max_new_tokens=1)
    stopped = (await client.post(STOP, **how)).json()
    seen = (await client.get("/expert_distribution")).json()
    dumped = (await client.post(DUMP, **how)).json()
    assert (seen["tokens"], seen["recording"], seen["top_k"]) == (3, False, 2)
    assert stopped == {"message": TEXTS[STOP].strip(), **seen}
    assert dumped == {"message": TEXTS[DUMP].strip(), "file": dumped["file"], **seen}
    assert Path(dumped["file"]) in files(shared)
    for layer in seen["layers"]:
        counts = layer["counts"]
        assert layer["selections"] == sum(counts) == 6
        assert layer["balancedness"] == pytest.approx(6 / 8 / max(counts))
        assert layer["top"][0] == {
            "expert": counts.index(max(counts)),
            "count": max(counts),
            "share": pytest.approx(max(counts) / 6),
        }
    assert seen["balancedness"] == pytest.approx(sum(layer["balancedness"] for layer in seen["layers"]) / 2)
    generate(shared, [[5, 6, 7]], max_new_tokens=1)
    assert (await client.get("/expert_distribution")).json()["tokens"] == 0


async def test_format_text_wins_over_the_header(client: httpx.AsyncClient) -> None:
    answer = await client.get(STOP, params={"format": "text"}, headers={"accept": "application/json"})
    assert answer.text == TEXTS[STOP]


async def test_what_is_refused(client: httpx.AsyncClient, shared: Engine) -> None:
    dense = shared.models[1].name
    before = files(shared)
    for path in (*TEXTS, "/expert_distribution", "/expert_distribution/stream"):
        answer = await client.get(path, params={"model": dense})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{dense} is not a MoE model")
        answer = await client.get(path, params={"model": "nobody"})
        assert answer.status_code == 400
        assert f"there are: {shared.models[0].name}, {dense}" in answer.json()["error"]["message"]
    answer = await client.get(DUMP, params={"format": "xml"})
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")
    assert "'json' or 'text'" in answer.json()["message"]
    assert files(shared) == before


def test_who_may_call() -> None:
    scopes = {path: handler.opt["scope"] for handler in trunkline_routes(None, {}) for path in handler.paths}  # type: ignore[arg-type]
    assert scopes.pop("/expert_distribution/page") == "public"  # it has no data
    assert set(scopes.values()) == {"admin"}
    assert set(scopes) == {*TEXTS, "/expert_distribution", "/expert_distribution/stream"}


async def test_the_stream_grows(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames themselves: ASGITransport would wait for the end of a stream that has none."""
    monkeypatch.setattr(live_routes, "EVENT_SECONDS", 0.01)
    offline.start(shared)

    class Lifecycle:
        draining = False

    class Service:
        async def run(self, control: str, model: str | None) -> Any:
            import msgspec

            from trunkline.plugins.moe_stats.schemas import Snapshot

            return msgspec.convert(shared.call(control), Snapshot)

    class Request:
        query_params: ClassVar[dict[str, str]] = {}

        class app:
            state = {"lifecycle": Lifecycle}  # noqa: RUF012

    service: Any = Service()
    frames: AsyncIterator[bytes] = live_routes._events(service, Request, await service.run("experts_look", None))  # type: ignore[arg-type]

    async def tokens() -> int:
        frame = await anext(frames)
        assert frame.startswith(b"data: ")
        assert frame.endswith(b"\n\n")
        return int(json.loads(frame[6:])["tokens"])

    assert await tokens() == 0
    generate(shared, [[5, 6, 7]], max_new_tokens=1)
    counted = await tokens()
    assert counted > 0
    assert await tokens() == counted
    Lifecycle.draining = True
    with pytest.raises(StopAsyncIteration):
        await anext(frames)


async def test_the_routes_can_be_described(client: httpx.AsyncClient) -> None:
    """GET and POST of one path are two operations."""
    schema = (await client.get("/schema/openapi.json")).json()
    for path in TEXTS:
        assert set(schema["paths"][path]) >= {"get", "post"}
    operations = [one["operationId"] for path in schema["paths"].values() for one in path.values()]
    assert len(operations) == len(set(operations))
