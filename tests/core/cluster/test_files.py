"""Replicas on other machines get the files that calls name."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.client.supervisor import WatchdogLimits
from trunkline.core.cluster.replica import relay
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.server.two_phases import update_all
from trunkline.core.types import Submission, on_replica

SHORT = WatchdogLimits(unhealthy=0.3, silent=1.0, one_pass=5.0, tick=0.05)


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A file of 3.5 MB."""
    file = tmp_path / "sent.safetensors"
    file.write_bytes(random.Random(0).randbytes(3_500_000))
    return file


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a replica that can't read the front's files."""

    monkeypatch.setattr(relay, "file_of", lambda call: tmp_path / "missing" if "path" in call.arguments else None)
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


async def contents(client: Any, name: str) -> list[Any]:
    with on_replica(name):
        found: list[Any] = await client.call("contents", model="m")
    return found


async def update(client: Any, file: Path) -> Any:
    return await update_all(client, "update_weights_from_tensor", "m", path=str(file), weight_version="2")


async def test_a_replica_on_this_machine_reads_the_file(cluster: Callable[..., Any], sent: Path) -> None:
    client, _ = await cluster(1)
    assert (await update(client, sent))["success"]
    assert await contents(client, "r0") == [[str(sent), zlib.crc32(sent.read_bytes())]]


async def test_others_get_a_copy_beside_their_requests(
    cluster: Callable[..., Any], params: Any, sent: Path, elsewhere: Path
) -> None:
    client, _ = await cluster(2)
    [reply] = client.submit("m", "echo", [Submission(prompt=[1], params=params(n=30, delay=0.01), rid="r")])
    assert (await update(client, sent))["success"]
    for name in ("r0", "r1"):
        [[path, digest]] = await contents(client, name)
        assert path != str(sent)
        assert Path(path).parent == elsewhere
        assert digest == zlib.crc32(sent.read_bytes())
    assert list(elsewhere.iterdir()) == []
    await reply.result()
    assert len(reply.tokens) == 30


async def test_a_file_that_cannot_be_read(cluster: Callable[..., Any], tmp_path: Path, elsewhere: Path) -> None:
    client, _ = await cluster(1)
    with pytest.raises(EngineDown, match="can't be read"):
        await update(client, tmp_path / "none")
    assert list(elsewhere.iterdir()) == []


async def test_a_copy_that_cannot_be_written(
    cluster: Callable[..., Any], sent: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = await cluster(1)
    elsewhere.write_text("a file, where a folder should be")
    with pytest.raises(RequestError, match="can't write"):
        await update(client, sent)
    elsewhere.unlink()
    written: list[int] = []

    def write(self: Any, part: bytes) -> None:
        written.append(len(part))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trunkline.core.cluster.files.ReceivedFile.write", write)
    with pytest.raises(RequestError, match="No space left"):
        await update(client, sent)
    assert len(written) == 1
    assert list(elsewhere.iterdir()) == []


async def test_the_engine_or_the_front_is_lost_meanwhile(
    cluster: Callable[..., Any], sent: Path, elsewhere: Path, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunkline.core.cluster.replicas.send_file", lambda *arguments: asyncio.sleep(60))
    client, started = await cluster(1, limits=SHORT)
    for lose in (started.handle.relays["r0"].engine._process._child.kill, None):
        await until(lambda: client.transport.healthy)
        updating = asyncio.create_task(update(client, sent))
        await until(lambda: elsewhere.exists() and list(elsewhere.iterdir()))
        if lose is None:
            await started.handle.cut("r0")
        else:
            lose()
        with pytest.raises(EngineDown):
            await updating
        await until(lambda: list(elsewhere.iterdir()) == [])
