from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.core.discovery import CORE, Plugin, find, select
from trunkline.core.errors import ConfigError, PluginError
from trunkline.core.host import Host

INSTALLED = [Plugin(name, f"module_{name}") for name in (CORE, "shout", "whisper")]


def names(only: list[str] | None = None, without: tuple[str, ...] = ()) -> list[str]:
    return [plugin.name for plugin in select(INSTALLED, only, without)]


def test_selection() -> None:
    assert names() == [CORE, "shout", "whisper"]
    assert names(only=["shout"]) == [CORE, "shout"]
    assert names(without=("shout",)) == [CORE, "whisper"]
    assert names(only=["shout", "whisper"], without=("shout",)) == [CORE, "whisper"]
    assert names(only=[]) == [CORE]


def test_names_that_are_not_installed() -> None:
    with pytest.raises(ConfigError, match="'shot'; did you mean 'shout'"):
        names(only=["shot"])
    with pytest.raises(ConfigError, match="'xyz'; installed are: models, shout, whisper"):
        names(without=("xyz",))


def test_cores_own_plugin_stays() -> None:
    with pytest.raises(ConfigError, match="can't be left out"):
        names(without=(CORE,))


def install(folder: Path, distribution: str, name: str, target: str) -> None:
    """What an installer leaves behind for importlib.metadata."""
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[trunkline]\n{name} = {target}\n")


def test_an_installed_plugin_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "loud", "loud", "loud_plugin")
    monkeypatch.syspath_prepend(tmp_path)
    [plugin] = [plugin for plugin in find() if plugin.name == "loud"]
    assert (plugin.distribution, plugin.version, plugin.origin) == ("loud", "1.2", "loud 1.2")
    with pytest.raises(PluginError, match=r"'loud'.*loud 1\.2.*loud_plugin"):
        Host.load(only=["loud"])
    assert "loud" in Host.load().quarantined


def test_one_name_from_two_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "one", "loud", "one_plugin")
    install(tmp_path, "two", "loud", "two_plugin")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="installed by both"):
        find()
