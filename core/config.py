"""Settings: one frozen struct per owner, from which TOML tables and command-line flags are made.

A field's description and bounds stand in its annotation, once. Values come from, weakest first:
defaults, a TOML file, flags. :class:`Config` is what both processes run by; it crosses to the
engine as plain builtins (:meth:`Config.dump`, :meth:`Config.load`).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from trunkline.core.types import SettingsGroup

from .errors import ConfigError
from .host import Host

DEFAULT_MODEL = "demo:smollm2-135m-instruct"

_MANY = 1 << 31  # outer bound of counts: beyond it int32 token ids and slots overflow
_HUGE = 1 << 50  # outer bound of byte counts
_LONG = 30 * 86400.0  # outer bound of durations, seconds

Count = Annotated[int, Meta(ge=1, le=_MANY)]
Bytes = Annotated[int, Meta(ge=1, le=_HUGE)]
Seconds = Annotated[float, Meta(gt=0, le=_LONG)]
Seed = Annotated[int, Meta(ge=0, lt=_MANY)]
Threads = Annotated[int, Meta(ge=1, le=4096)]
Limit = Annotated[int, Meta(ge=-1, lt=_MANY)]  # -1 = none


def _about(text: str, *aliases: str) -> Meta:
    """The annotation of a field: its description, and further flags that mean the same."""
    return Meta(description=text, extra={"aliases": aliases} if aliases else None)


class ServerSettings(Struct, frozen=True, kw_only=True):
    """The HTTP process: TOML table ``[server]``."""

    host: Annotated[str, _about("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 30000
    api_key: Annotated[str | None, _about("Key that clients send as 'Authorization: Bearer KEY'.")] = None
    admin_api_key: Annotated[str | None, _about("Key for administrative routes; without it --api-key opens them.")] = (
        None
    )
    cors_origins: Annotated[
        tuple[str, ...], _about("Browser origins that may call the server, comma-separated; none by default.")
    ] = ()
    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], _about("What is worth a log line.")
    ] = "info"
    max_queued_requests: Annotated[Count, _about("Sequences that may wait for a model; more are answered 503.")] = 2048
    max_queued_tokens: Annotated[
        Count | None, _about("Prompt tokens that may wait for a model; default 16 times its KV pool.")
    ] = None
    max_queued_requests_all_models: Annotated[Count, _about("Sequences that may wait for all models together.")] = 8192
    max_batch_size: Annotated[Count, _about("Items in one request's batch.")] = 1024
    max_body_bytes: Annotated[Bytes, _about("Largest request body.")] = 10 << 20
    max_held_body_bytes: Annotated[
        Bytes, _about("Bodies of all running requests together; beyond it, bodies over 64 KiB are answered 503.")
    ] = 256 << 20
    stream_timeout: Annotated[Seconds, _about("Seconds a client may leave a stream unread.")] = 60.0
    queue_timeout: Annotated[Seconds | None, _about("Seconds a request may wait before it is given up.")] = None
    request_timeout: Annotated[Seconds | None, _about("Seconds a request may take in all.")] = None
    drain_timeout: Annotated[Seconds, _about("Seconds that running requests get to finish on SIGTERM.")] = 30.0
    watchdog_timeout: Annotated[Seconds, _about("Seconds one engine pass may take before it counts as hung.")] = 300.0
    enable_metrics: Annotated[bool, _about("Answer GET /metrics, for Prometheus.")] = False
    skip_server_warmup: Annotated[bool, _about("Be ready without a first request to oneself.")] = False


class EngineSettings(Struct, frozen=True, kw_only=True):
    """The device process: TOML table ``[engine]``."""

    random_seed: Annotated[Seed | None, _about("Seed of what is random in the engine; default random.")] = None
    allow_weights_dir: Annotated[
        str | None, _about("Folder that weight updates must come from; default any folder or hub id.")
    ] = None
    kv_cache_bytes: Annotated[
        Bytes | None, _about("KV memory on a CPU, all models; default 40% of what is left, at most 4 GiB.")
    ] = None
    threads: Annotated[
        Threads | None, _about("CPU threads for computing; default OMP_NUM_THREADS, else one a physical core.")
    ] = None


class ModelSettings(Struct, frozen=True, kw_only=True):
    """One served model: a TOML table ``[[models]]``, or a model on the command line and the flags after it."""

    model_path: Annotated[str, _about("Folder, hub id or demo:NAME; repeat for several models.", "--model")]
    tokenizer_path: Annotated[str | None, _about("Folder or hub id of the tokenizer; default the model's.")] = None
    served_model_name: Annotated[str | None, _about("Name that clients use; default the model path.")] = None
    served_model_aliases: Annotated[
        tuple[str, ...], _about("Further names that clients may use, comma-separated.")
    ] = ()
    revision: Annotated[str | None, _about("Branch, tag or commit of a hub model.")] = None
    task: Annotated[
        tuple[str, ...] | None, _about("Tasks to serve, comma-separated; default what the checkpoint is made for.")
    ] = None
    is_embedding: Annotated[bool, _about("Serve vectors from a causal model.")] = False
    context_length: Annotated[Count | None, _about("Most tokens in one request; default from the model.")] = None
    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        _about("Number format of weights and cache."),
    ] = "auto"
    attention_backend: Annotated[Literal["auto", "cpu", "torch_native", "triton"], _about("Attention kernels.")] = (
        "auto"
    )
    chunked_prefill_size: Annotated[
        Limit | None, _about("Most tokens computed in one pass; -1 = no limit, default auto.")
    ] = None
    max_running_requests: Annotated[Count | None, _about("Sequences computed at the same time; default auto.")] = None
    max_total_tokens: Annotated[Count | None, _about("Size of the KV pool in tokens; default from memory.")] = None
    schedule_policy: Annotated[
        Literal["lpm", "fcfs"], _about("Who goes first: longest cached prefix, or first come.")
    ] = "lpm"
    disable_radix_cache: Annotated[bool, _about("Don't share computed prefixes between requests.")] = False
    weight_version: Annotated[str, _about("Label of the weights, shown in replies.")] = "default"
    chat_template: Annotated[str | None, _about("Jinja file to use instead of the model's chat template.")] = None

    @property
    def name(self) -> str:
        """The name clients see."""
        return self.served_model_name or self.model_path

    @property
    def reference(self) -> str:
        """What ``trunkline_resolve_model`` is asked for: the path, with ``@revision`` where one is set."""
        return f"{self.model_path}@{self.revision}" if self.revision else self.model_path


class PluginSelection(Struct, frozen=True, kw_only=True):
    """Which plugins run: TOML table ``[plugins]``, or ``--plugin`` and ``--no-plugin``."""

    only: Annotated[tuple[str, ...] | None, _about("Load only these and core's own.")] = None
    without: Annotated[tuple[str, ...], _about("Leave these out.")] = ()


class Config(Struct, frozen=True, kw_only=True):
    """Everything a server runs by. The first model is the primary one."""

    settings: dict[str, Any]  # group name -> that group's struct
    models: tuple[ModelSettings, ...]
    plugins: PluginSelection = PluginSelection()

    @property
    def server(self) -> ServerSettings:
        group = self.settings["server"]
        assert isinstance(group, ServerSettings)
        return group

    @property
    def engine(self) -> EngineSettings:
        group = self.settings["engine"]
        assert isinstance(group, EngineSettings)
        return group

    def dump(self) -> dict[str, Any]:
        """Builtins that msgpack can carry; :meth:`load` is the inverse."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def load(cls, data: Mapping[str, Any], host: Host) -> Config:
        """A config from nested builtins: tables by group name under ``settings``, ``models``, ``plugins``.

        Missing tables and keys take their defaults, no models means the demo model. ConfigError
        names the table and the key of whatever can't be used.
        """
        groups = settings_groups(host)
        tables = data.get("settings", {})
        _known("settings table", tables, groups)
        models = data.get("models") or [{"model_path": DEFAULT_MODEL}]
        config = cls(
            settings={name: convert(tables.get(name, {}), group.schema, name) for name, group in groups.items()},
            models=tuple(convert(table, ModelSettings, "models") for table in models),
            plugins=convert(data.get("plugins", {}), PluginSelection, "plugins"),
        )
        _names_differ(config.models)
        return config


CORE_GROUPS = (SettingsGroup("server", ServerSettings), SettingsGroup("engine", EngineSettings))
_OTHER_TABLES = {"models": ModelSettings, "plugins": PluginSelection}

S = TypeVar("S", bound=Struct)


def settings_groups(host: Host) -> dict[str, SettingsGroup]:
    """Core's groups, then the plugins'. ConfigError when a group or a field's flag is claimed twice."""
    groups = {group.name: group for group in CORE_GROUPS}
    for name, group in host.settings().items():
        if name in groups or name in _OTHER_TABLES:
            raise ConfigError(f"A plugin's settings group is called {name!r}, which is core's own; it must be renamed.")
        groups[name] = group
    owner = dict.fromkeys(ModelSettings.__struct_fields__, "models")
    for name, group in groups.items():
        for field in group.schema.__struct_fields__:
            other = owner.setdefault(field, name)
            if other != name:
                raise ConfigError(f"Settings [{name}] and [{other}] both have {field!r}; one has to rename it.")
    return groups


def convert(table: Any, schema: type[S], name: str) -> S:
    """A TOML table or a dict of flag values as its struct. ConfigError names table, key and limit."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[{name}] must be a table, not {table!r}.")
    _known(f"[{name}] setting", table, schema.__struct_fields__)
    try:
        return msgspec.convert(dict(table), schema)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        key = re.sub(r"^`?\$\.?|`$", "", where)
        value = table.get(key.split("[")[0])
        given = "" if value is None else f" = {value!r}"
        raise ConfigError(f"[{name}] {key}{given}: {problem.replace('`', '')}".replace("  ", " ")) from None


def read_file(path: Path) -> dict[str, Any]:
    """A TOML file in the form that :meth:`Config.load` takes."""
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"Can't read the configuration file {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't valid TOML: {error}.") from error
    data: dict[str, Any] = {key: tables.pop(key) for key in _OTHER_TABLES if key in tables}
    for name, table in [*tables.items(), ("plugins", data.get("plugins", {}))]:
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name!r} must be a table, not {table!r}; settings stand under [server] etc.")
    models = data.get("models", [])
    if not (isinstance(models, list) and all(isinstance(model, dict) for model in models)):
        raise ConfigError(f"{path}: write [[models]], one table for each model, not [models].")
    return data | {"settings": tables}


def merge(
    data: Mapping[str, Any],
    *,
    settings: Mapping[str, Mapping[str, Any]],
    every_model: Mapping[str, Any],
    models: Iterable[Mapping[str, Any]],
    plugins: Mapping[str, Any],
) -> dict[str, Any]:
    """Lay flags over a file's ``data``.

    ``every_model`` applies to all models. ``models`` (each with its ``model_path``), when there
    are any, are the models that are served; one that the file has too keeps the file's other keys.
    """
    tables = {name: dict(table) for name, table in data.get("settings", {}).items()}
    for name, flags in settings.items():
        tables[name] = tables.get(name, {}) | dict(flags)
    filed = [dict(table) for table in data.get("models", [])]
    by_path = {table.get("model_path"): table for table in filed}
    named = [by_path.get(model["model_path"], {}) | dict(every_model) | dict(model) for model in models]
    served = named or [table | dict(every_model) for table in filed or [{"model_path": DEFAULT_MODEL}]]
    return {"settings": tables, "models": served, "plugins": dict(data.get("plugins", {})) | dict(plugins)}


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}."
            raise ConfigError(f"Unknown {what} {name!r}; {hint}")


def _names_differ(models: Iterable[ModelSettings]) -> None:
    seen: set[str] = set()
    for model in models:
        for name in {model.name, *model.served_model_aliases}:
            if name in seen:
                raise ConfigError(f"Two models are served as {name!r}; set --served-model-name on one of them.")
            seen.add(name)
