"""``demo:`` models: fetched by the real pip from a local folder, never from the network."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import zipfile
from pathlib import Path

import pytest

from trunkline.core.errors import ModelError
from trunkline.core.model.sources import catalogue
from trunkline.core.model.sources.catalogue import CATALOGUE, DemoModel, cache_folder, extract, fetch

FILES = {
    "tiny_model/model/config.json": b"{}",
    "tiny_model/model/1_Pooling/config.json": b'{"pooling": "mean"}',
    "tiny_model/__init__.py": b"raise SystemExit('a wheel of the catalogue is never run')",
    "tiny_model-0.1.0.dist-info/LICENSE": b"free",
    "tiny_model-0.1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1.0\n",
    "tiny_model-0.1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-0.1.0.dist-info/RECORD": b"",
}


def quiet(what: str, done: int, total: int) -> None:
    """A ProgressCallback that shows nothing."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip sees of the world, and an empty cache folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """``demo:tiny``, a wheel with a model folder in it."""
    wheel = index / "tiny_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = DemoModel("tiny-model", "0.1.0", digest, wheel.stat().st_size, "tiny_model/model/", "free")
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry


def test_fetched_once_then_without_pip(tiny: DemoModel, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("demo:tiny", quiet)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "1_Pooling/config.json",
        "LICENSE",
        "config.json",
    ]
    monkeypatch.setattr(catalogue, "download", None)
    assert fetch("demo:tiny", quiet) == folder


def test_cache_is_private_and_holds_only_the_model(tiny: DemoModel) -> None:
    folder = fetch("demo:tiny", quiet)
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, ".tiny.lock"}


def test_progress_counts_the_wheel_s_bytes_and_names_each_phase(tiny: DemoModel) -> None:
    seen: list[tuple[str, int, int]] = []
    fetch("demo:tiny", lambda *step: seen.append(step))
    phases = list(dict.fromkeys(what for what, _, _ in seen))
    assert phases == [
        "downloading tiny-model==0.1.0 (free) from the Python package index",
        "checking sha256",
        "unpacking",
    ]
    assert all(done <= total for _, done, total in seen)
    assert {total for what, _, total in seen if what.startswith("downloading")} == {tiny.size}


def test_without_a_terminal_each_phase_is_one_log_line(tiny: DemoModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trunkline.model"):
        fetch("demo:tiny")
    assert len(caplog.messages) == 3
    assert caplog.messages[0].startswith("demo:tiny: downloading tiny-model==0.1.0")


def test_unknown_name_lists_the_catalogue(index: Path) -> None:
    with pytest.raises(ModelError, match=r"no demo model 'demo:gpt-9'.*demo:smollm2-135m-instruct, demo:all-minilm"):
        fetch("demo:gpt-9", quiet)


def test_another_file_under_the_same_name_is_refused(tiny: DemoModel, index: Path) -> None:
    with zipfile.ZipFile(index / tiny.wheel, "a") as archive:
        archive.writestr("tiny_model/model/more.json", b"{}")
    with pytest.raises(ModelError, match="not the file that trunkline pins"):
        fetch("demo:tiny", quiet)
    assert not any(path.is_dir() for path in (cache_folder() / "models").iterdir())


def test_pip_s_reason_and_the_way_out_are_named(tiny: DemoModel, index: Path) -> None:
    (index / tiny.wheel).unlink()
    with pytest.raises(
        ModelError, match=r"No matching distribution.*tiny_model-0.1.0-py3-none-any.whl.*PIP_FIND_LINKS"
    ):
        fetch("demo:tiny", quiet)


def test_python_without_pip_is_named(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "run", lambda *_: (1, "/usr/bin/python: No module named pip\n"))
    with pytest.raises(ModelError, match="-m ensurepip"):
        fetch("demo:tiny", quiet)


def test_unwritable_cache_names_the_variable(tiny: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="TRUNKLINE_CACHE"):
        fetch("demo:tiny", quiet)


def test_interrupted_work_is_begun_afresh(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "_unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch("demo:tiny", quiet)
    leftover = cache_folder() / "models" / ".tiny.partial"
    assert not leftover.exists()
    leftover.mkdir()
    (leftover / "ready").mkdir()  # as after kill -9
    assert (fetch("demo:tiny", quiet) / "config.json").is_file()


def test_several_at_once_build_it_once(tiny: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[str] = []

    def build(entry: DemoModel, folder: Path, partial: Path, report: object) -> None:
        builds.append(entry.package)
        time.sleep(0.05)
        folder.mkdir()

    monkeypatch.setattr(catalogue, "_build", build)
    threads = [threading.Thread(target=fetch, args=("demo:tiny", quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == ["tiny-model"]


@pytest.mark.parametrize("name", ["folder/../../evil", "folder//etc/evil"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("folder/good", b"1")
        archive.writestr(name, b"1")
    target = tmp_path / "target"
    target.mkdir()
    with zipfile.ZipFile(tmp_path / "bad.zip") as archive:
        if ".." in name:
            with pytest.raises(ModelError, match="leads outside"):
                extract(archive, "folder/", target)
        else:
            extract(archive, "folder/", target)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"bad.zip", "target"}


def test_a_bomb_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_UNPACKED_LIMIT", 10)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/zeros", bytes(100))
    with zipfile.ZipFile(tmp_path / "bomb.zip") as archive, pytest.raises(ModelError, match="unpacks to more"):
        extract(archive, "folder/", tmp_path)
    assert not (tmp_path / "zeros").exists()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUNKLINE_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("TRUNKLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/trunkline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "trunkline"


def test_main_fetches_and_prints_where(
    tiny: DemoModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    assert catalogue.main(["demo:tiny"]) == 0
    assert capsys.readouterr().out.strip() == str(fetch("demo:tiny"))
    assert catalogue.main(["demo:none"]) == 1
    assert "no demo model" in capsys.readouterr().err


def test_every_entry_is_pinned() -> None:
    for entry in CATALOGUE.values():
        assert len(entry.sha256) == 64
        assert entry.licence
        assert entry.wheel.endswith("-py3-none-any.whl")
