"""The settings of core, one frozen struct per owner; a field's description and bounds stand in its annotation, once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

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
    """One served model: a TOML table ``[[models]]``, or a model on the command line and the flags after it.

    The fields of the groups in ``plugins`` are keys of the same table, and flags like the others.
    """

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
    skip_tokenizer_init: Annotated[
        bool, _about("Load no tokenizer: requests are token ids only, and so are replies.")
    ] = False
    plugins: Annotated[dict[str, Any], _about("The plugins' per-model groups by name; no flag and no key.")] = {}

    @property
    def name(self) -> str:
        """The name clients see."""
        return self.served_model_name or self.model_path

    @property
    def reference(self) -> str:
        """What ``trunkline_resolve_model`` is asked for: the path, with ``@revision`` where one is set."""
        return f"{self.model_path}@{self.revision}" if self.revision else self.model_path

    def table(self) -> dict[str, Any]:
        """The ``[[models]]`` table that says all of this, as builtins."""
        own: dict[str, Any] = msgspec.to_builtins(self)
        for group in own.pop("plugins").values():
            own |= group
        return own


class PluginSelection(Struct, frozen=True, kw_only=True):
    """Which plugins run: TOML table ``[plugins]``, or ``--plugin`` and ``--no-plugin``."""

    only: Annotated[tuple[str, ...] | None, _about("Load only these and core's own.")] = None
    without: Annotated[tuple[str, ...], _about("Leave these out.")] = ()
