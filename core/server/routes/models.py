"""Descriptions of the server and its models: ``/get_model_info``, ``/get_server_info``, ``/v1/models`` and others."""

from __future__ import annotations

from collections.abc import Iterator

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from trunkline.core.client.models import ModelQuery, find, named_or_primary
from trunkline.core.errors import RequestError
from trunkline.core.server.api.bodies import AnyRequest, json_response
from trunkline.core.server.api.reply_schemas import (
    LongModelInfo,
    ModelCard,
    ModelInfo,
    ModelList,
    ServerInfo,
    WeightVersion,
)
from trunkline.core.server.info import InfoReplies
from trunkline.core.server.replicas import first
from trunkline.core.types import EngineClient, ReplicaReply, ServedModel


def model_routes(engine: EngineClient, info: InfoReplies) -> Iterator[HTTPRouteHandler]:
    infer = {"scope": "infer", "query": ModelQuery}

    def selected(request: AnyRequest) -> ServedModel:
        return named_or_primary(engine.models, request.query_params.get("model"))

    @get("/get_model_info", opt=infer | {"replies": ModelInfo})
    async def get_model_info(request: AnyRequest) -> Response[bytes]:
        """Five keys about the model that ``?model=`` names, by default the first."""
        return json_response(info.model_info(selected(request)))

    @get("/model_info", opt=infer | {"replies": LongModelInfo})
    async def model_info(request: AnyRequest) -> Response[bytes]:
        """All keys about a model: those of /get_model_info and more."""
        return json_response(info.long_model_info(selected(request)))

    @get(["/get_server_info", "/server_info"], opt=infer | {"replicas": merge_server_info, "replies": ServerInfo})
    async def server_info(request: AnyRequest) -> Response[bytes]:
        """Settings in force, without secrets, and the current state of the engine."""
        return json_response(info.server_info(selected(request)))

    @get("/get_weight_version", opt=infer | {"replies": WeightVersion})
    async def weight_version(request: AnyRequest) -> Response[bytes]:
        """The label of a model's weights."""
        return json_response({"weight_version": selected(request).weight_version})

    @get("/v1/models", opt={"scope": "infer", "dialect": "openai", "replies": ModelList})
    async def list_models() -> Response[bytes]:
        """OpenAI's list of models."""
        return json_response({"object": "list", "data": [info.card(model) for model in engine.models]})

    @get("/v1/models/{name:path}", opt={"scope": "infer", "dialect": "openai", "replies": ModelCard})
    async def get_model(request: AnyRequest) -> Response[bytes]:
        """OpenAI's description of one model. If only one is loaded, any name means that model."""
        name = str(request.path_params["name"]).removeprefix("/")
        models = engine.models
        model = find(models, name) or find(models, f"/{name}")  # routing drops the leading slash of a path
        if model is None and len(models) == 1:
            [model] = models
        if model is None:
            raise RequestError(f"The model '{name}' does not exist", param="model", code="model_not_found")
        return json_response(info.card(model))

    yield from (get_model_info, model_info, server_info, weight_version, list_models, get_model)


def merge_server_info(replies: list[ReplicaReply]) -> Response[bytes]:
    """The first replica's server info with the ``internal_states`` of all that gave theirs, each with its name."""
    given = [reply for reply in replies if reply.ok]
    if not given:
        return first(replies)
    found = [(reply.replica, reply.json()) for reply in given]
    states = [state | {"replica": name} for name, info in found for state in info["internal_states"]]
    return json_response(found[0][1] | {"dp_size": len(replies), "internal_states": states})
