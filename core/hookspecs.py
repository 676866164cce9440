"""The hooks: what a plugin can contribute, when it is asked, and in which process.

This module is the plugin author's manual. Write a module, import ``hookimpl``, implement any of
the functions below under the same name (arguments may be left out, never renamed), and name the
module in your package's entry points::

    [project.entry-points."trunkline"]
    shout = "trunkline_shout"

Hooks are asked once, at start-up; what they return is kept in plain dicts and tuples, and no
hook is called while requests are served. ``trunkline plugins inspect NAME`` shows what a plugin
answered. Two processes load every plugin: the *front* (HTTP, CLI) and the *engine* (the device).
A plugin module is imported by ``trunkline --help`` too, so import heavy things inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    import typer
    from litestar.config.app import AppConfig

    from trunkline.core.types import (
        EngineClient,
        ExpertObserver,
        Head,
        Model,
        ModelInfo,
        ModelSource,
        ServedModel,
        Serves,
        Settings,
        SettingsGroup,
        Stage,
        Tokenizer,
    )

PROJECT = "trunkline"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def trunkline_hookspecs() -> ModuleType | None:
    """Both processes, first of all: a module with hook specifications of the plugin's own.

    Lets plugins be extended by plugins::

        @hookimpl
        def trunkline_hookspecs():
            from . import hooks          # functions marked with hookspec
            return hooks
    """


@hookspec
def trunkline_settings() -> SettingsGroup | None:
    """Both processes, before anything heavy: the plugin's settings.

    They become the TOML table ``[shout]``, the flags ``--shout-level`` (a field's name with
    dashes) and ``settings["shout"]``::

        class ShoutSettings(Struct, frozen=True):
            shout_level: Annotated[int, Meta(ge=1, le=3, description="How loud.")] = 1

        @hookimpl
        def trunkline_settings():
            return SettingsGroup("shout", ShoutSettings)
    """


@hookspec
def trunkline_commands(app: typer.Typer) -> None:
    """Front, when the CLI is built: add commands to ``trunkline``::

    @hookimpl
    def trunkline_commands(app):
        @app.command()
        def shout(text: str) -> None:
            print(text.upper())
    """


@hookspec(firstresult=True)
def trunkline_resolve_model(reference: str) -> ModelSource | None:
    """Both processes: a local folder for a model reference, or None to let others try.

    May download; raises ModelError when the reference is its own but can't be had::

        @hookimpl
        def trunkline_resolve_model(reference):
            if reference.startswith("s3://"):
                return ModelSource(reference, fetch(reference))
    """


@hookspec(firstresult=True)
def trunkline_tokenizer(source: ModelSource) -> Tokenizer | None:
    """Both processes, at model load: the tokenizer of a model; core's own is asked last::

    @hookimpl
    def trunkline_tokenizer(source):
        if (Path(source.path) / "tekken.json").exists():
            return Tekken(source.path)
    """


@hookspec(firstresult=True)
def trunkline_weights(source: ModelSource) -> Iterable[tuple[str, torch.Tensor]] | None:
    """Engine, at model load: a stream of checkpoint tensors by name; core's own is asked last::

    @hookimpl
    def trunkline_weights(source):
        if source.path.endswith(".gguf"):
            return read_gguf(source.path)
    """


@hookspec
def trunkline_serves(model: ModelInfo) -> Serves | None:
    """Both processes, before load: can the plugin's task be served from this checkpoint?

    ::

        @hookimpl
        def trunkline_serves(model):
            if model.architecture.endswith("ForCausalLM"):
                return Serves("shout", "default")
            return Serves("shout", "no", "Shouting needs a …ForCausalLM checkpoint.")
    """


@hookspec
def trunkline_heads(model: ModelInfo, settings: Settings) -> Iterable[Head]:
    """Engine, before the weights are loaded: heads that the plugin's stages will call by name.

    Asked only when one of the plugin's tasks is active for the model. Core has two heads of its own: "lm", the
    logits of a causal language model, and "score", those of a ``…ForSequenceClassification``;
    ``model.score_rows`` says what to apply the latter to. For another module of the checkpoint's class::

        @hookimpl
        def trunkline_heads(model, settings):
            return [Head("shout", build=lambda whole: whole.shout_proj)]
    """


@hookspec
def trunkline_stages(model: Model, settings: Settings) -> Iterable[Stage]:
    """Engine, after load: the stages that serve this model. Two stages of one task are an error.

    Each model of the server is asked for; where a head that the stage needs isn't in ``model.heads``,
    return none. Stages for tasks that are not active on the model are dropped::

        @hookimpl
        def trunkline_stages(model, settings):
            return [ShoutStage(model)]
    """


@hookspec
def trunkline_expert_observers(model: Model, settings: Settings) -> Iterable[ExpertObserver]:
    """Engine, after load: who wants to see which experts tokens are sent to.

    Asked for mixture-of-experts models only, where the choices can be seen; ``model.expert_layers``
    says in which layers. A control finds its observer in ``model.expert_observers``::

        class Busiest:
            active = True

            def begin_pass(self, rows):
                self.tokens = sum(row.end - row.start for row in rows if row.request.key >= 0)

            def observe(self, layer, chosen):
                print(layer, chosen.flatten().mode().values)

            def end_pass(self):
                print(self.tokens, "tokens")

        @hookimpl
        def trunkline_expert_observers(model, settings):
            return [Busiest()]
    """


@hookspec
def trunkline_controls() -> dict[str, Callable[..., Any]]:
    """Engine, after load: functions that routes run by name between two batches, so without locks.

    A control gets the loaded model and the caller's keyword arguments; what it returns must be
    msgpack-able. RequestError becomes the client's error::

        @hookimpl
        def trunkline_controls():
            return {"shout_count": lambda model: {"count": model.stages["shout"].count}}
    """


@hookspec
def trunkline_info(model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Front, after load: extra keys for /model_info and server info::

    @hookimpl
    def trunkline_info(model, settings):
        return {"shout_level": settings["shout"].shout_level}
    """


@hookspec
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    """Front, when the server is built: Litestar route handlers.

    Each declares ``opt={"scope": "public" | "infer" | "admin"}`` or start-up fails; a path and
    method claimed twice is an error that names both plugins. ``dialect`` "openai" or "native" (the default)
    chooses the shape of errors.

    ``/openapi.json`` is made from the rest of ``opt``: ``body``, the Struct that ``read_body`` reads; ``query``, a
    Struct with the query parameters; ``replies``, a type for JSON with status 200, several in a tuple, or types by
    status and media type, ``{200: {JSON: Shout, SSE: Shout}, 409: {TEXT: str}, 204: None}`` (of an event stream,
    the type of an event's data; None for an empty body); ``reply_headers``, as ``{200: {"X-Loud": "How loud."}}``.
    Errors that every route can give are added. A field of the body that clients send and the route doesn't serve is
    declared ``Annotated[Any, Refused()]`` (``read_body`` answers 400 when it asks for something) or
    ``Annotated[Any, Ignored("why")]``, both from ``core.server.api``::

        @hookimpl
        def trunkline_routes(engine, settings):
            @post("/shout", opt={"scope": "infer", "body": ShoutBody, "replies": ShoutReply}, status_code=200)
            async def shout(request: AnyRequest) -> Response[Any]:
                body = await read_body(request, ShoutBody)
                return json_response({"text": body.text.upper()})
            return [shout]
    """


@hookspec
def trunkline_app_config(config: AppConfig) -> None:
    """Front, last before the app is built: change Litestar's AppConfig (middleware, lifespan)::

    @hookimpl
    def trunkline_app_config(config):
        config.middleware.append(MyMiddleware)
    """
