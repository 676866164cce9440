"""Profiles: as many passes as were asked for, one profile at a time, never without an end."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trunkline.core import Engine
from trunkline.core.engine.control import profile
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.schemas import GenerationParams


@pytest.fixture(scope="module")
def engine(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(str(zoo("llama")), dtype="float32", threads=1, decode_log_interval=0) as engine:
        yield engine


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def run(engine: Engine, new: int = 4) -> list[int]:
    params = GenerationParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    tokens = engine.submit("generation", list(range(5, 40)), params).result(60).tokens
    engine.call("flush_cache")  # a reply comes before its pass has ended
    return tokens


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def after_pass(engine: Engine) -> list[Any]:
    found: list[Any] = engine.client.transport.loop.after_pass
    return found


def test_from_start_to_stop(engine: Engine, folder: Path) -> None:
    alone = run(engine)
    engine.call("start_profile")
    with pytest.raises(RequestError, match=r"Profiling is already in progress. Call /stop_profile first.") as caught:
        engine.call("start_profile")
    assert caught.value.status == 400
    assert run(engine) == alone
    path = Path(engine.call("stop_profile"))
    assert list(folder.iterdir()) == [path]
    assert any("aten::" in str(event.get("name")) for event in events(path))
    with pytest.raises(RequestError, match="not in progress"):
        engine.call("stop_profile")
    assert after_pass(engine) == []


def test_a_number_of_passes_from_a_pass_on(engine: Engine, folder: Path) -> None:
    passes = engine.client.transport.loop.passes
    engine.call("start_profile", start_step=passes + 3, num_steps=2, record_shapes=True, memory=True, with_stack=True)
    run(engine, 3)
    assert not list(folder.iterdir())
    run(engine, 3)
    (path,) = folder.iterdir()
    assert events(path)
    assert after_pass(engine) == []
    engine.call("start_profile", start_step=1, num_steps=1)  # a pass long gone: at once
    run(engine, 1)
    assert len(list(folder.iterdir())) == 2
    engine.call("start_profile", start_step=1 << 40)
    assert engine.call("stop_profile") == ""  # it had not begun
    assert after_pass(engine) == []


def test_a_profile_that_nobody_stops_ends(engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MAX_PASSES", 3)
    engine.call("start_profile", num_steps=1 << 40)
    run(engine, 6)
    assert len(list(folder.iterdir())) == 1
    assert after_pass(engine) == []


def test_a_folder_that_can_not_be_made(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path / "file" / "inside"))
    with pytest.raises(RequestError, match="SGLANG_TORCH_PROFILER_DIR"):
        engine.call("start_profile")
    assert after_pass(engine) == []
    monkeypatch.delenv("SGLANG_TORCH_PROFILER_DIR")
    engine.call("start_profile")
    run(engine)
    path = Path(engine.call("stop_profile"))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.unlink()


def test_a_full_disk_ends_the_profile_and_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    alone = run(engine)
    with monkeypatch.context() as patch:
        patch.setattr(profile.profile, "export_chrome_trace", fail)
        engine.call("start_profile", num_steps=2)
        assert run(engine) == alone
    engine.call("start_profile")
    run(engine)
    assert Path(engine.call("stop_profile")).exists()
