from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Annotated, Any

import pytest
from litestar import get, post
from msgspec import Meta, Struct
from rich.console import Console

from trunkline.core.commands.plugins import show_list, show_plugin
from trunkline.core.discovery import Plugin
from trunkline.core.errors import ConfigError, PluginError
from trunkline.core.host import Host
from trunkline.core.types import SettingsGroup

MakePlugin = Callable[..., Plugin]


class ShoutSettings(Struct, frozen=True):
    shout_level: Annotated[int, Meta(ge=1, le=3, description="How loud [1 to 3].")] = 1


@get("/shout", opt={"scope": "public"}, sync_to_thread=False)
def listen() -> str:
    return ""


@post("/shout", opt={"scope": "infer"}, sync_to_thread=False)
def shout() -> str:
    return ""


@pytest.fixture
def host(plugin: MakePlugin) -> Host:
    found = plugin(
        "shout",
        trunkline_settings=lambda: SettingsGroup("shout", ShoutSettings),
        trunkline_routes=lambda engine, settings: [listen, shout],
        trunkline_controls=lambda: {"shout_count": print},
    )
    found.distribution, found.version = "trunkline-shout", "1.2"
    return Host([found, Plugin("broken", "no.such.module")])


def written(show: Callable[..., None], *args: Any) -> str:
    out = StringIO()
    show(*args, Console(file=out, width=200))
    return out.getvalue()


def test_list_shows_origin_hooks_and_quarantine(host: Host) -> None:
    lines = {line.split()[0]: line for line in written(show_list, host).splitlines()}
    assert all(word in lines["shout"] for word in ("trunkline-shout", "1.2", "controls, routes, settings"))
    assert "left out: plugin 'broken': can't be imported" in lines["broken"]


def test_inspect_shows_everything(host: Host) -> None:
    out = written(show_plugin, host, "shout")
    for words in ("trunkline-shout 1.2", "--shout-level", "How loud [1 to 3].", "shout_count"):
        assert words in out
    routes = [line.split() for line in out.splitlines() if "/shout" in line]
    assert sorted(route[-2:] for route in routes) == [["/shout", "infer"], ["/shout", "public"]]
    assert ["POST", "/shout", "infer"] in routes


def test_inspect_says_so_when_routes_need_a_running_engine(plugin: MakePlugin) -> None:
    host = Host([plugin("nosy", trunkline_routes=lambda engine: [engine.models[0]])])
    assert "known only while a server runs" in written(show_plugin, host, "nosy")


def test_inspect_of_what_is_not_there(host: Host) -> None:
    with pytest.raises(ConfigError, match="no plugin 'x'"):
        show_plugin(host, "x", Console())
    with pytest.raises(PluginError, match="'broken'"):
        show_plugin(host, "broken", Console())
