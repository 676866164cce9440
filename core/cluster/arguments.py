"""The arguments of :func:`trunkline.core.cluster.build`, and the configuration that they give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from trunkline.core.client.engine import tables_of
from trunkline.core.config import Config, merge, read_file
from trunkline.core.errors import ConfigError
from trunkline.core.host import Host

TEXTS = ("model", "config", "model_path", "served_model_name", "revision", "api_key", "admin_api_key")  # never numbers


class Arguments(Struct, kw_only=True):
    """What isn't a setting of ``trunkline serve``.

    * ``model``: one model; ``models``: ``[[models]]`` tables instead.
    * ``config``: a TOML file, as ``--config``; on all nodes that may run the ingress or a replica.
    * ``ingress_replicas``: number of fronts. Sessions and stored responses are in the memory of one.
    * ``resources``: Ray's ``ray_actor_options`` of each engine replica.
    """

    model: str = ""
    models: list[dict[str, Any]] = []
    config: str = ""
    ingress_replicas: int = 1
    resources: dict[str, Any] = {}


def read_arguments(args: Mapping[str, Any], host: Host) -> tuple[Arguments, Config]:
    """``args``: those of :class:`Arguments`, and settings by name, in text (``serve run``) or as YAML's types.

    ConfigError for an unknown name or a wrong value.
    """
    parsed = {name: value if name in TEXTS else _parse(value) for name, value in args.items()}
    own = {name: parsed.pop(name) for name in Arguments.__struct_fields__ if name in parsed}
    try:
        arguments = msgspec.convert(own, Arguments)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error} (arguments of the application: {', '.join(Arguments.__struct_fields__)})") from None
    tables, every_model = tables_of(host, parsed)
    models = [{"model_path": arguments.model}] if arguments.model else arguments.models
    data = read_file(Path(arguments.config)) if arguments.config else {}
    merged = merge(data, settings=tables, every_model=every_model, models=models, plugins={})
    return arguments, Config.load(merged, host)


def _parse(value: Any) -> Any:
    """Text that is JSON as what it stands for: numbers, booleans, lists."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value
