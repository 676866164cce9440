"""Long work in threads doesn't hold up short work."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trunkline.core.client.threads import LONG_WORK, SHORT_THREADS, WorkThreads

pytestmark = pytest.mark.field


async def test_long_work_does_not_hold_up_short_work() -> None:
    threads, end = WorkThreads(), threading.Event()
    long = [asyncio.create_task(threads.run(end.wait, size=LONG_WORK + 1)) for _ in range(5)]
    await asyncio.sleep(0)
    for size in (0, LONG_WORK):
        assert await asyncio.wait_for(threads.run(lambda: "done", size=size), 10) == "done"
    assert not any(task.done() for task in long)
    end.set()
    assert await asyncio.wait_for(asyncio.gather(*long), 10) == [True] * 5
    threads.close()


async def test_one_slow_piece_of_short_work_does_not_hold_up_another() -> None:
    threads, end = WorkThreads(), threading.Event()
    slow = [asyncio.create_task(threads.run(end.wait)) for _ in range(SHORT_THREADS - 1)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(threads.run(lambda: 1), 10) == 1
    end.set()
    await asyncio.gather(*slow)
    threads.close()


async def test_errors_arrive() -> None:
    threads = WorkThreads()
    for size in (0, 1 << 30):
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0, size=size)
    threads.close()
