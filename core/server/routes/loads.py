"""``GET /get_load`` and ``/v1/loads``: the current load of each model, for routers and monitoring."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta

from trunkline.core.client.models import ModelQuery, ModelsQuery, named_model
from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import AnyRequest, json_response
from trunkline.core.server.api.media_types import JSON, PROMETHEUS, TEXT
from trunkline.core.server.info import InfoReplies
from trunkline.core.types import EngineClient, ServedModel, on_replica

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")  # SGLang's


class LoadsQuery(ModelsQuery):
    """Query parameters of ``/v1/loads``."""

    dp_rank: Annotated[int, Meta(ge=0, le=1 << 31, description="Index of one of the served models.")] | None = None
    include: Annotated[str, Meta(description=f"Comma-separated sections: {', '.join(SECTIONS)}.")] = "all"
    format: Annotated[Literal["json", "prometheus"], Meta(description="Format of the reply.")] = "json"


class OldLoad(TypedDict):
    """A model's load in ``/get_load``: the keys of SGLang 0.5.3."""

    rid: None
    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class MemoryLoad(TypedDict):
    """Sizes in GB, and the capacity of the KV pool in tokens."""

    weight_gb: float
    kv_cache_gb: float
    graph_gb: float
    token_capacity: int


class Queues(TypedDict):
    """Number of waiting requests."""

    waiting: int


class ModelLoad(TypedDict):
    """A model's load. ``dp_rank`` is its index among the served models; with several replicas, among those of all,
    the first replica's first, and ``replica`` is the name."""

    timestamp: float
    dp_rank: int
    replica: NotRequired[str]
    model: str
    num_running_reqs: int
    num_waiting_reqs: int
    num_waiting_uncached_tokens: int
    num_used_tokens: int
    num_total_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float
    gen_throughput: float
    cache_hit_rate: float
    utilization: float
    memory: NotRequired[MemoryLoad]
    queues: NotRequired[Queues]


class Loads(TypedDict):
    """The reply of ``/v1/loads``."""

    timestamp: str
    version: str
    accelerator: str
    num_accelerators: int
    loads: list[ModelLoad]


def load_routes(engine: EngineClient, info: InfoReplies) -> Iterator[HTTPRouteHandler]:
    infer = {"scope": "infer"}

    @get("/get_load", opt=infer | {"query": ModelQuery, "replies": list[OldLoad]})
    async def get_load(request: AnyRequest) -> Response[bytes]:
        """The numbers of requests and tokens of each model."""
        return json_response([_old_load(load) for load in loads(request)])

    @get("/v1/loads", opt=infer | {"query": LoadsQuery, "replies": {200: {JSON: Loads, TEXT: str}}})
    async def v1_loads(request: AnyRequest) -> Response[Any]:
        """The load, memory and queues of each model, as JSON or as Prometheus text."""
        query = request.query_params
        shown = [
            _select_sections(load, _parse_sections(query.get("include")))
            for load in loads(request, query.get("dp_rank"))
        ]
        if query.get("format") == "prometheus":
            return Response(prometheus(shown), headers={"content-type": PROMETHEUS})
        if query.get("format") not in (None, "", "json"):
            raise RequestError("format must be json or prometheus.", param="format")
        reply: Loads = {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": version("trunkline"),
            "accelerator": "cpu",
            "num_accelerators": 0,
            "loads": shown,
        }
        return json_response(reply)

    def loads(request: AnyRequest, rank: str | None = None) -> list[ModelLoad]:
        """The loads of the models that the query selects."""
        if rank is not None and not (rank.isascii() and rank.isdecimal() and len(rank) < 10):
            raise RequestError(f"dp_rank must be a number from 0 on, got {rank[:40]!r}.", param="dp_rank")
        wanted = None if rank is None else int(rank)
        named = named_model(engine.models, request.query_params.get("model"))
        found: list[ModelLoad] = []
        before = 0  # models of the replicas before
        for replica in engine.replicas or ("",):
            with on_replica(replica):
                models = engine.models
                for index, model in enumerate(models, before):
                    if (named is None or named.name == model.name) and wanted in (None, index):
                        load = _load(index, model, info.status(model))
                        found.append({**load, "replica": replica} if replica else load)
                before += len(models)
        return found

    yield from (get_load, v1_loads)


def _parse_sections(include: str | None) -> set[str]:
    """The sections that ``?include=`` names. RequestError, with SGLang's text, for unknown ones."""
    names = {name.strip() for name in include.split(",")} if include else {"all"}
    if unknown := sorted(names.difference(SECTIONS)):
        raise RequestError(
            f"Invalid include sections: {str(unknown)[:200]}. Valid options: {sorted(SECTIONS)}", param="include"
        )
    return names


def _load(rank: int, model: ServedModel, state: dict[str, Any]) -> ModelLoad:
    """``state``: the model's keys in :meth:`.InfoReplies.status`."""
    capacity, running = model.max_total_tokens, state["num_running_reqs"]
    used, waiting = state["num_used_tokens"], state["num_waiting_tokens"]
    memory = state["memory_usage"]
    return {
        "timestamp": time.time(),
        "dp_rank": rank,
        "model": model.name,
        "num_running_reqs": running,
        "num_waiting_reqs": state["num_waiting_reqs"],
        "num_waiting_uncached_tokens": round(waiting * (1 - state["cache_hit_rate"])),
        "num_used_tokens": used,
        "num_total_tokens": used + waiting,
        "max_total_num_tokens": capacity,
        "max_running_requests": model.max_running_requests,
        "token_usage": round(used / max(1, capacity), 4),
        "gen_throughput": state["gen_throughput"],
        "cache_hit_rate": state["cache_hit_rate"],
        "utilization": round(running / max(1, model.max_running_requests), 4),
        "memory": {
            "weight_gb": memory["weight"],
            "kv_cache_gb": memory["kvcache"],
            "graph_gb": memory["graph"],
            "token_capacity": capacity,
        },
        "queues": {"waiting": state["num_waiting_reqs"]},
    }


def _select_sections(load: ModelLoad, sections: set[str]) -> ModelLoad:
    """Remove the sections that aren't selected; "core" always stays."""
    if "all" not in sections:
        if "memory" not in sections:
            del load["memory"]
        if "queues" not in sections:
            del load["queues"]
    return load


def _old_load(load: ModelLoad) -> OldLoad:
    waiting = load["num_waiting_reqs"]
    return {
        "rid": None,
        "dp_rank": load["dp_rank"],
        "num_reqs": load["num_running_reqs"] + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": load["num_total_tokens"],
    }


def prometheus(loads: Sequence[ModelLoad]) -> str:
    """Prometheus text: gauges under SGLang's names ``sglang_KEY`` and ``sglang_SECTION_KEY``, one sample per load."""
    samples: dict[str, list[str]] = {}
    for load in loads:
        flat: dict[str, Any] = {}
        for key, value in load.items():
            if isinstance(value, dict):
                flat.update({f"{key}_{name}": number for name, number in value.items()})
            else:
                flat[key] = value
        replica = f',replica="{flat["replica"]}"' if "replica" in flat else ""
        rank = flat.pop("dp_rank")
        for key, value in flat.items():
            if not isinstance(value, str):
                samples.setdefault(f"sglang_{key}", []).append(f'sglang_{key}{{dp_rank="{rank}"{replica}}} {value}')
    lines = [line for name, values in samples.items() for line in (f"# TYPE {name} gauge", *values)]
    return "\n".join(lines) + "\n"
