"""The hooks: what a plugin can contribute, and when each is called in which process.

This is the plugin author's manual. Write a module, import ``hookimpl``, implement any of the functions below under
the same name (arguments may be left out, never renamed), and name the module in your package's entry points::

    [project.entry-points."trunkline"]
    shout = "trunkline_shout"

A plugin module is imported by ``trunkline --help`` too, so import heavy things inside functions.

Two processes load every plugin. The *front* is the process of the ``trunkline`` command: the command line and, for
``trunkline serve``, the HTTP server. The *engine* is the process that the front starts; it owns the device. The second
paragraph of each hook says when it is called in the front, in the engine, and at a weight update
(``POST /update_weights_from_disk`` or ``/update_weights_from_tensor``; "from disk" is the former only). Where one of
these isn't named, the hook isn't called. Return values are kept in dicts and tuples: requests for a task call no hook.

An engine that is restarted after a crash makes all its calls again; a weight update that fails makes no further
calls. ``trunkline.core.Engine``, in the caller's process, makes the engine's calls and those of the front that concern
requests: ``resolve_model`` and ``tokenizer`` again, ``request_observers`` and, with ``enable_metrics``, ``metrics``.
Commands other than ``serve`` call ``hookspecs``, ``settings`` and ``commands`` only; ``trunkline plugins inspect NAME``
also calls ``settings``, ``controls`` and ``routes`` of NAME.
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
    from prometheus_client.registry import Collector

    from trunkline.core.types import Ask, EngineClient, ExpertObserver, RequestObserver, Settings, SettingsGroup, Stage
    from trunkline.core.types.models import Head, Model, ModelInfo, ModelSource, ServedModel, Serves, Tokenizer
    from trunkline.core.types.transforms import Transform

PROJECT = "trunkline"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def trunkline_hookspecs() -> ModuleType | None:
    """A module with hook specifications of the plugin's own, for plugins of this plugin.

    Front: once, before any other hook. Engine: once, before any other hook.

    ``ask(hook, **arguments)``, which stages and routes get, gives the items that other plugins return from it::

        @hookimpl
        def trunkline_hookspecs():
            from . import hooks          # functions marked with hookspec
            return hooks
    """


@hookspec
def trunkline_settings() -> SettingsGroup | None:
    """The plugin's settings.

    Front: once, before the command line is parsed. Engine: once, when it reads its configuration.

    They become the TOML table ``[shout]``, the flags ``--shout-level`` (a field with dashes), ``settings["shout"]``::

        class ShoutSettings(Struct, frozen=True):
            shout_level: Annotated[int, Meta(ge=1, le=3, description="How loud.")] = 1
        @hookimpl
        def trunkline_settings():
            return SettingsGroup("shout", ShoutSettings)
    """


@hookspec
def trunkline_commands(app: typer.Typer) -> None:
    """Add commands to ``trunkline``.

    Front: once, when the command line is built::

        @hookimpl
        def trunkline_commands(app):
            @app.command()
            def shout(text: str): print(text.upper())
    """


@hookspec(firstresult=True)
def trunkline_resolve_model(reference: str) -> ModelSource | None:
    """A local folder for a model reference. After None, the next plugin is asked; core's own is the last.

    Front: once for each model, before the engine starts (downloads show their progress there), and once more for
    its tokenizer (``--tokenizer-path``, by default the model). Engine: once for each model, and once more for its
    ``--tokenizer-path``. Update: from disk, once in the front (not with ``--allow-weights-dir``), once in the engine.

    It may download. It raises ModelError for a reference that it knows but can't get::

        @hookimpl
        def trunkline_resolve_model(reference):
            return ModelSource(reference, fetch(reference)) if reference.startswith("s3://") else None
    """


@hookspec(firstresult=True)
def trunkline_tokenizer(source: ModelSource) -> Tokenizer | None:
    """The tokenizer of a model. After None, the next plugin is asked; core's own is the last.

    Front: once for each model, while the engine starts. Engine: once for each model, before its weights are loaded::

        @hookimpl
        def trunkline_tokenizer(source):
            return Tekken(source.path) if (Path(source.path) / "tekken.json").exists() else None
    """


@hookspec(firstresult=True)
def trunkline_weights(source: ModelSource) -> Iterable[tuple[str, torch.Tensor]] | None:
    """A stream of checkpoint tensors by name. After None, the next plugin is asked; core's own is the last.

    Engine: once for each model, after its heads are known. Update: from disk, once, with the new checkpoint; from
    tensors, once, with the served one, unless its tensors came from core::

        @hookimpl
        def trunkline_weights(source):
            return read_npz(source.path) if (Path(source.path) / "model.npz").exists() else None
    """


@hookspec
def trunkline_serves(model: ModelInfo, settings: Settings) -> Serves | None:
    """Whether the plugin's task can be served from a checkpoint.

    Engine: once for each model, before any is loaded. Update: from disk, once, with the new checkpoint::

        @hookimpl
        def trunkline_serves(model):
            if model.architecture.endswith("ForCausalLM"):
                return Serves("shout", "default")
            return Serves("shout", "no", "Shouting needs a …ForCausalLM checkpoint.")
    """


@hookspec
def trunkline_heads(model: ModelInfo, settings: Settings) -> Iterable[Head]:
    """Heads that the plugin's stages will call by name.

    Engine: once for each model, before its weights are loaded. Update: once, before the new weights are loaded.

    Called only when one of the plugin's tasks is active for the model. Core has two heads of its own: "lm", the
    logits of a causal language model, and "score", those of a ``…ForSequenceClassification``, which is applied to
    the rows that ``model.score_rows`` names. For another module of the checkpoint's class::

        @hookimpl
        def trunkline_heads(model, settings):
            return [Head("shout", build=lambda whole: whole.shout_proj)]
    """


@hookspec
def trunkline_transforms(model: ModelInfo, settings: Settings) -> Iterable[Transform]:
    """Other ways to store the weights of linear layers: quantised, or in a layout of the plugin's own.

    Engine: once for each model, before any is loaded. Update: from disk, once, with the new checkpoint.

    They apply to matrices of layers and of experts. The first that packs one wins; ``--quantization`` is last::

        @hookimpl
        def trunkline_transforms(model, settings):
            pack = lambda names, weight: TernaryLinear(weight) if ".mlp." in names[0] else None
            return [Transform("ternary", pack, error=0.6)]
    """


@hookspec
def trunkline_stages(model: Model, settings: Settings, ask: Ask) -> Iterable[Stage]:
    """The stages that serve a model. Two stages of one task are an error.

    Engine: once for each model, after its weights are loaded. Update: once, with the new model.

    Return none if a head that the stage needs isn't in ``model.heads``. Stages of inactive tasks are dropped::

        @hookimpl
        def trunkline_stages(model, settings):
            return [ShoutStage(model)]
    """


@hookspec
def trunkline_expert_observers(model: Model, settings: Settings) -> Iterable[ExpertObserver]:
    """Observers of the routing in mixture-of-experts models: to which experts each token is sent.

    Engine: once for each mixture-of-experts model whose routing can be observed, after its stages.

    A weight update keeps them. ``model.expert_layers`` has the layers, ``model.expert_observers`` the observers::

        class Busiest:
            active = True
            def begin_pass(self, rows): ...
            def observe(self, layer, chosen):
                print(layer, chosen.flatten().mode().values)
            def end_pass(self): ...
        @hookimpl
        def trunkline_expert_observers(model, settings):
            return [Busiest()]
    """


@hookspec
def trunkline_request_observers(settings: Settings) -> Iterable[RequestObserver]:
    """Observers that are called when a request, of any task, is submitted, starts, progresses and ends.

    Front: once, while the engine starts.

    ``core.types.RequestObserver`` documents when each method is called; one that isn't overridden costs nothing::

        class Durations(RequestObserver):
            def ended(self, reply): print(reply.model, reply.task, reply.finished - reply.created)
        @hookimpl
        def trunkline_request_observers(settings):
            return [Durations()]
    """


@hookspec
def trunkline_metrics(settings: Settings) -> Iterable[Collector]:
    """Collectors of the package ``prometheus_client``, shown by ``GET /metrics``.

    Front: once, while the engine starts, and only with ``--enable-metrics``.

    A collector that is a RequestObserver as well is called for requests: return it from this hook only. Give metrics
    ``registry=None``, because each server has a registry of its own. A second collector of the same name is left out::

        from prometheus_client import Counter
        class Shouted(Counter, RequestObserver):
            def ended(self, reply): self.labels(reply.model_label).inc(len(reply.tokens))
        @hookimpl
        def trunkline_metrics(settings):
            return [Shouted("shout_tokens", "Tokens shouted.", ["model_name"], registry=None)]
    """


@hookspec
def trunkline_controls() -> dict[str, Callable[..., Any]]:
    """Functions that routes run by name in the engine, between two passes, so without locks.

    Engine: once, after all models are loaded.

    One gets the loaded model and keyword arguments, and returns what msgpack can encode; clients get a RequestError::

        @hookimpl
        def trunkline_controls():
            return {"shout_count": lambda model: {"count": model.stages["shout"].count}}
    """


@hookspec
def trunkline_info(model: ServedModel, settings: Settings) -> dict[str, Any]:
    """Additional keys for /model_info and server info.

    Front: once for each model, when the server is built. Update: once for each model, in the front, when its info
    is next asked for (the same after ``/update_weight_version`` and after a restart of the engine)::

        @hookimpl
        def trunkline_info(model, settings):
            return {"shout_level": settings["shout"].shout_level}
    """


@hookspec
def trunkline_routes(engine: EngineClient, settings: Settings, ask: Ask) -> Iterable[Any]:
    """Litestar route handlers.

    Front: once, when the server is built; the engine is ready then.

    Start-up fails for a handler without ``opt={"scope": "public" | "infer" | "admin"}``, and when two plugins have a
    handler for the same path and method. ``docs/server_api.md`` has the other keys of ``opt``::

        @hookimpl
        def trunkline_routes(engine, settings):
            @post("/shout", opt={"scope": "infer", "body": ShoutBody, "replies": ShoutReply}, status_code=200)
            async def shout(request: AnyRequest) -> Response[Any]:
                return json_response({"text": (await read_body(request, ShoutBody)).text.upper()})
            return [shout]
    """


@hookspec
def trunkline_app_config(config: AppConfig) -> None:
    """Change Litestar's AppConfig: middleware, lifespan and the like.

    Front: once, last before the server is built::

        @hookimpl
        def trunkline_app_config(config):
            config.middleware.append(MyMiddleware)
    """
