from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta, Struct

from trunkline.core.config import DEFAULT_MODEL, Config, merge, read_file, settings_groups
from trunkline.core.discovery import Plugin
from trunkline.core.errors import ConfigError
from trunkline.core.host import Host
from trunkline.core.settings import EngineSettings, ModelSettings, ServerSettings
from trunkline.core.types import SettingsGroup

MakePlugin = Callable[..., Plugin]


class ShoutSettings(Struct, frozen=True):
    shout_level: Annotated[int, Meta(ge=1, le=3, description="How loud.")] = 1


class WhisperSettings(Struct, frozen=True):
    softness: Annotated[int, Meta(ge=1, description="How soft.")] = 1
    to_whom: tuple[str, ...] = ()


def group(name: str, schema: type[Struct], *, per_model: bool = False) -> Callable[[], SettingsGroup]:
    return lambda: SettingsGroup(name, schema, per_model)


@pytest.fixture
def host(plugin: MakePlugin) -> Host:
    return Host([
        plugin("shout", trunkline_settings=group("shout", ShoutSettings)),
        plugin("whisper", trunkline_settings=group("whisper", WhisperSettings, per_model=True)),
    ])  # fmt: skip


def test_models_have_per_model_groups_for_themselves(host: Host) -> None:
    config = Config.load(
        {
            "settings": {"whisper": {"softness": 2, "to_whom": ["all"]}},
            "models": [{"model_path": "a"}, {"model_path": "b", "softness": 5}],
        },
        host,
    )
    first, second = (config.settings_of(model)["whisper"] for model in config.models)
    assert (first, second) == (WhisperSettings(2, ("all",)), WhisperSettings(5, ("all",)))
    assert config.settings_of(config.models[0])["shout"].shout_level == 1
    assert "whisper" not in config.settings  # no one could say whose it is
    assert (config.models[1].table()["softness"], "plugins" in config.models[1].table()) == (5, False)


def test_defaults_serve_the_demo_model(host: Host) -> None:
    config = Config.load({}, host)
    assert [model.name for model in config.models] == [DEFAULT_MODEL]
    assert config.server == ServerSettings()
    assert config.engine == EngineSettings()
    assert config.settings["shout"].shout_level == 1


def test_dump_crosses_msgpack_and_loads_the_same(host: Host) -> None:
    data = {
        "settings": {"server": {"port": 1, "cors_origins": ["http://a"]}, "shout": {"shout_level": 3}},
        "models": [{"model_path": "a", "task": ["x", "y"], "softness": 3}, {"model_path": "b", "context_length": 5}],
        "plugins": {"without": ["shout"]},
    }
    config = Config.load(data, host)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(config.dump()))
    assert Config.load(wire, host) == config
    assert config.models[0].task == ("x", "y")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"settings": {"server": {"port": 70000}}}, ["[server] port", "70000", "<= 65535"]),
        ({"settings": {"server": {"prot": 1}}}, ["[server]", "'prot'", "did you mean 'port'"]),
        ({"settings": {"server": {"stream_timeout": 0}}}, ["stream_timeout", "> 0"]),
        ({"settings": {"shout": {"shout_level": 4}}}, ["[shout] shout_level", "<= 3"]),
        ({"settings": {"engine": {"threads": "many"}}}, ["[engine] threads", "many", "int"]),
        ({"settings": {"engine": 3}}, ["[engine] must be a table"]),
        ({"settings": {"serve": {}}}, ["'serve'", "did you mean 'server'"]),
        ({"models": [{"model_path": "a", "dtype": "int3"}]}, ["[models] dtype", "int3"]),
        ({"models": [{"served_model_name": "a"}]}, ["model_path"]),
        ({"models": [{"model_path": "a", "softness": 0}]}, ["[whisper] softness = 0", ">= 1"]),
        ({"models": [{"model_path": "a", "softnes": 1}]}, ["[models] setting 'softnes'", "did you mean 'softness'"]),
        ({"models": [{"model_path": "a", "shout_level": 1}]}, ["[models] setting 'shout_level'"]),
        ({"models": [{"model_path": "a", "plugins": {}}]}, ["[models] setting 'plugins'"]),
        ({"models": ["a"]}, ["[models] must be a table"]),
        ({"models": [{"model_path": "a"}, {"model_path": "a"}]}, ["'a'", "--served-model-name"]),
        ({"plugins": {"only": "a"}}, ["[plugins] only", "array"]),
    ],
)
def test_what_cannot_be_used_is_named(host: Host, data: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(data, host)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_flag_belongs_to_one_group(plugin: MakePlugin) -> None:
    class Other(Struct, frozen=True):
        port: int = 1

    with pytest.raises(ConfigError, match="both have 'port'"):
        settings_groups(Host([plugin("other", trunkline_settings=group("other", Other))]))


def test_a_revision_is_part_of_the_reference_and_not_of_the_name() -> None:
    model = ModelSettings(model_path="owner/name", revision="v1")
    assert (model.reference, model.name) == ("owner/name@v1", "owner/name")
    assert ModelSettings(model_path="folder").reference == "folder"


@pytest.mark.parametrize("name", ["server", "models", "plugins"])
def test_groups_of_core_cannot_be_taken(plugin: MakePlugin, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        settings_groups(Host([plugin("other", trunkline_settings=group(name, ShoutSettings))]))


def test_file_and_flags(tmp_path: Path, host: Host) -> None:
    file = tmp_path / "trunkline.toml"
    file.write_text(
        """
        [server]
        port = 1
        host = "0.0.0.0"
        [shout]
        shout_level = 2
        [[models]]
        model_path = "a"
        dtype = "float32"
        [[models]]
        model_path = "b"
        [plugins]
        without = ["other"]
        """
    )
    flags: dict[str, Any] = {"settings": {"server": {"port": 2}}, "every_model": {}, "models": [], "plugins": {}}
    config = Config.load(merge(read_file(file), **flags), host)
    assert (config.server.port, config.server.host, config.settings["shout"].shout_level) == (2, "0.0.0.0", 2)
    assert [(model.name, model.dtype) for model in config.models] == [("a", "float32"), ("b", "auto")]
    assert config.plugins.without == ("other",)


def test_models_on_the_command_line_replace_the_files_list(host: Host) -> None:
    data = {"models": [{"model_path": "a", "dtype": "float32"}, {"model_path": "b"}]}
    models: list[dict[str, Any]] = [{"model_path": "c"}, {"model_path": "a", "context_length": 7}]
    merged = merge(data, settings={}, every_model={"weight_version": "v"}, models=models, plugins={})
    config = Config.load(merged, host)
    own = {"whisper": WhisperSettings()}
    assert config.models == (
        ModelSettings(model_path="c", weight_version="v", plugins=own),
        ModelSettings(model_path="a", dtype="float32", context_length=7, weight_version="v", plugins=own),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server\n", "isn't valid TOML"),
        (None, "Can't read"),
        ("port = 3", "'port' must be a table"),
        ("plugins = 3", "'plugins' must be a table"),
        ("[models]\nmodel_path = 'a'", r"write \[\[models\]\]"),
        ("models = ['a']", r"write \[\[models\]\]"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "bad.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_file(file)


def test_an_alias_means_one_model(host: Host) -> None:
    models: list[dict[str, Any]] = [{"model_path": "a", "served_model_aliases": ["b", "a"]}, {"model_path": "c"}]
    assert Config.load({"models": models}, host).models[0].served_model_aliases == ("b", "a")
    with pytest.raises(ConfigError, match="Two models are served as 'c'"):
        Config.load({"models": [{"model_path": "a", "served_model_aliases": ["c"]}, {"model_path": "c"}]}, host)
