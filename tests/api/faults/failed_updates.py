"""How weight updates are made to fail, in the middle of a load."""

from __future__ import annotations

import asyncio

import httpx

from .bench import Bench, Injections, until

INJECTIONS = Injections()


async def update(bench: Bench, checkpoint: str, label: str = "new") -> httpx.Response:
    """The reply to an update. One that may kill the engine needs a label of its own, or it is rejected later."""
    body = {"model_path": str(bench.checkpoints[checkpoint]), "weight_version": label}
    return await bench.call("/update_weights_from_disk", body)


def refused(name: str, point: str = "", error: str = "") -> None:
    """Register the fault of an update that is refused: by its checkpoint, or by a fault at ``point``."""

    @INJECTIONS.causes(name)
    async def inject(bench: Bench) -> None:
        before = (await bench.arm(point, error))["fired"]
        bench.mark()
        answer = await update(bench, "sound" if point else name)
        assert (answer.status_code, answer.json()["success"]) == (400, False), answer.text
        assert (await bench.arm())["fired"] == before + bool(point)


refused("update: another config")
refused("update: a tensor is missing")
refused("update: an unknown tensor")
refused("update: a wrong shape")
refused("update: a wrong dtype")
refused("update: a cut file")
refused("update: a damaged header")
refused("update: no memory", "memory")
refused("update: reading raises", "read", "RuntimeError")
refused("update: packing raises", "pack", "MemoryError")
refused("update: the last step raises", "last step", "RuntimeError")


@INJECTIONS.causes("update: the swap raises")
async def break_swap(bench: Bench) -> None:
    await bench.arm("swap", "RuntimeError")
    await lost_update(bench, asyncio.create_task(update(bench, "sound", f"swap {bench.number}")))
    bench.mark()


@INJECTIONS.causes("update: kill -9")
async def kill_update(bench: Bench) -> None:
    await bench.arm("read", "hang")
    updating = asyncio.create_task(update(bench, "sound", f"kill {bench.number}"))
    words = f"loading {str(bench.checkpoints['sound'])!r} into"
    seen = bench.server.log.read_text().count(words)

    async def loading() -> bool:
        return bool(bench.server.log.read_text().count(words) > seen)

    await until(loading)
    bench.server.engine().kill()
    bench.mark()
    await lost_update(bench, updating)


async def lost_update(bench: Bench, updating: asyncio.Task[httpx.Response]) -> None:
    """The reply to an update during which the engine ended."""
    answer = await updating
    assert answer.status_code == 503, answer.text
    assert "retry-after" in answer.headers
