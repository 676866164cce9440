"""The settings of core: a frozen struct per group, whose annotations have the description and bounds of each field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

_MAX_COUNT = 1 << 31  # token ids and slots are int32
_MAX_BYTES = 1 << 50
_MAX_SECONDS = 30 * 86400.0

PositiveCount = Annotated[int, Meta(ge=1, le=_MAX_COUNT)]
Bytes = Annotated[int, Meta(ge=1, le=_MAX_BYTES)]
Seconds = Annotated[float, Meta(gt=0, le=_MAX_SECONDS)]
Seed = Annotated[int, Meta(ge=0, lt=_MAX_COUNT)]
Threads = Annotated[int, Meta(ge=1, le=4096)]
Passes = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
Limit = Annotated[int, Meta(ge=-1, lt=_MAX_COUNT)]  # -1 = none


def _about(text: str, *aliases: str) -> Meta:
    """The annotation of a field: its description, and other names of its flag."""
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
        Literal["debug", "info", "warning", "error", "critical"], _about("Least severe level that is logged.")
    ] = "info"
    max_queued_requests: Annotated[PositiveCount, _about("Limit on sequences that wait for a model; more get 503.")] = (
        2048
    )
    max_queued_tokens: Annotated[
        PositiveCount | None, _about("Limit on prompt tokens that wait for a model; default 16 times its KV pool.")
    ] = None
    max_queued_requests_all_models: Annotated[PositiveCount, _about("Limit on sequences that wait for all models.")] = (
        8192
    )
    max_batch_size: Annotated[PositiveCount, _about("Limit on the items of one request.")] = 1024
    max_body_bytes: Annotated[Bytes, _about("Limit on the bytes of a request body.")] = 10 << 20
    max_held_body_bytes: Annotated[
        Bytes, _about("Limit on the bytes of all running requests' bodies; beyond it, bodies over 64 KiB get 503.")
    ] = 256 << 20
    stream_timeout: Annotated[Seconds, _about("Seconds after which a stream that its client doesn't read ends.")] = 60.0
    queue_timeout: Annotated[Seconds | None, _about("Seconds after which a waiting request fails.")] = None
    request_timeout: Annotated[Seconds | None, _about("Seconds from arrival after which a request fails.")] = None
    drain_timeout: Annotated[Seconds, _about("Seconds that running requests get to finish on SIGTERM.")] = 30.0
    watchdog_timeout: Annotated[
        Seconds, _about("Seconds after which an engine pass counts as hung and the engine is restarted.")
    ] = 300.0
    enable_metrics: Annotated[bool, _about("Serve Prometheus metrics at GET /metrics.")] = False
    skip_server_warmup: Annotated[bool, _about("Skip the warm-up request.")] = False


class EngineSettings(Struct, frozen=True, kw_only=True):
    """The device process: TOML table ``[engine]``."""

    random_seed: Annotated[
        Seed | None, _about("Seed from which requests without a seed get theirs; default random.")
    ] = None
    allow_weights_dir: Annotated[
        str | None, _about("Folder that weight updates must come from; default any folder or hub id.")
    ] = None
    device: Annotated[
        str,
        Meta(
            pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
            description="Where models are computed: cpu, cuda or cuda:INDEX; auto is the first GPU, else the CPU.",
        ),
    ] = "auto"
    mem_fraction_static: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        _about(
            "Share of a GPU's memory for weights and KV pools, by default 0.88. On a CPU, of the available memory; "
            "by default, --kv-cache-bytes applies."
        ),
    ] = None
    disable_overlap_schedule: Annotated[
        bool, _about("On a GPU, don't prepare a batch while the one before it is computed.")
    ] = False
    disable_cuda_graph: Annotated[bool, _about("On a GPU, launch the kernels of decode passes one by one.")] = False
    cuda_graph_max_bs: Annotated[
        int, Meta(ge=1, le=512, description="Largest number of requests in a decode pass that is a CUDA graph.")
    ] = 512
    kv_cache_bytes: Annotated[
        Bytes | None,
        _about("KV memory of all models; default on a CPU 40% of what the weights leave, at most 4 GiB."),
    ] = None
    decode_log_interval: Annotated[
        Passes, _about("Decode passes of a model between two log lines of running and queued requests; 0 = never.")
    ] = 40
    threads: Annotated[
        Threads | None, _about("Compute threads on a CPU; default OMP_NUM_THREADS, else one per physical core.")
    ] = None


class ModelSettings(Struct, frozen=True, kw_only=True):
    """One served model: a TOML table ``[[models]]``, or a model on the command line and the flags after it.

    The fields of the groups in ``plugins`` are keys of the same table and flags after the same model.
    """

    model_path: Annotated[str, _about("Folder, hub id or demo:NAME; repeat for several models.", "--model")]
    tokenizer_path: Annotated[str | None, _about("Folder or hub id of the tokenizer; default the model's.")] = None
    served_model_name: Annotated[
        str | None, _about("Name by which clients request the model; default the model path.")
    ] = None
    served_model_aliases: Annotated[
        tuple[str, ...], _about("Additional names of the model for clients, comma-separated.")
    ] = ()
    revision: Annotated[str | None, _about("Branch, tag or commit of a hub model.")] = None
    task: Annotated[
        tuple[str, ...] | None, _about("Tasks to serve, comma-separated; default those of the checkpoint.")
    ] = None
    context_length: Annotated[
        PositiveCount | None, _about("Limit on the tokens of a request; default the model's.")
    ] = None
    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        _about("Number format of weights and, by default, KV cache."),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"],
        _about(
            "Number format of the KV cache: that of --dtype, or int8 with a scale for each token and head, for the "
            "backend cpu."
        ),
    ] = "auto"
    attention_backend: Annotated[
        Literal["auto", "cpu", "torch_native", "triton"], _about("Kernels of all operations.")
    ] = "auto"
    enable_deterministic_inference: Annotated[
        bool, _about("On a CPU, give a request the same result, bit for bit, alone and in any batch.")
    ] = False
    chunked_prefill_size: Annotated[
        Limit | None, _about("Limit on the tokens of a forward pass; -1 = no limit, default auto.")
    ] = None
    max_stall_ms: Annotated[
        Annotated[float, Meta(ge=0, le=3_600_000)] | None,
        _about(
            "Time that prompts may add to a pass in which other requests decode, in milliseconds; chunks are made "
            "small enough by the measured speed. 0 = no limit; by default, such a pass may take 2.5 times as long as "
            "one without prompts."
        ),
    ] = None
    max_running_requests: Annotated[
        PositiveCount | None, _about("Limit on sequences that run at the same time; default auto.")
    ] = None
    max_total_tokens: Annotated[
        PositiveCount | None, _about("Size of the KV pool in tokens; by default, it depends on the free memory.")
    ] = None
    schedule_policy: Annotated[
        Literal["lpm", "fcfs"],
        _about("Order of waiting requests: longest cached prefix first, or first come, first served."),
    ] = "lpm"
    disable_radix_cache: Annotated[bool, _about("Disable the prefix cache.")] = False
    weight_version: Annotated[str, _about("Label of the weights, shown in replies.")] = "default"
    chat_template: Annotated[str | None, _about("Jinja file to use instead of the model's chat template.")] = None
    skip_tokenizer_init: Annotated[
        bool, _about("Load no tokenizer: requests are token ids only, and so are replies.")
    ] = False
    replicas: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        _about("Engines of this model on Ray Serve; by default one engine without Ray (docs/scaling.md)."),
    ] = None
    plugins: Annotated[dict[str, Any], _about("The plugins' per-model groups by name; no flag and no key.")] = {}

    @property
    def name(self) -> str:
        """The name clients see."""
        return self.served_model_name or self.model_path

    @property
    def reference(self) -> str:
        """The argument of ``trunkline_resolve_model``: the path, followed by ``@revision`` if one is set."""
        return f"{self.model_path}@{self.revision}" if self.revision else self.model_path

    def table(self) -> dict[str, Any]:
        """These settings as a ``[[models]]`` table of builtin types."""
        own: dict[str, Any] = msgspec.to_builtins(self)
        for group in own.pop("plugins").values():
            own |= group
        return own


class PluginSelection(Struct, frozen=True, kw_only=True):
    """Which plugins run: TOML table ``[plugins]``, or ``--plugin`` and ``--no-plugin``."""

    only: Annotated[tuple[str, ...] | None, _about("Load only these and core's own.")] = None
    without: Annotated[tuple[str, ...], _about("Leave these out.")] = ()
