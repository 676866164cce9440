"""Text generation: ``/generate``, OpenAI's completions, chats and responses, and ``trunkline chat``.

``stage.py`` and ``sampling/`` (sampling, end of sequences) run in the engine; everything else runs in the front.
``hooks.py`` specifies hooks with which other plugins change logits and end sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.core.hookspecs import hookimpl
from trunkline.core.types import Serves, SettingsGroup

from .settings import GROUP, TASK, GenerationSettings, input_limit

if TYPE_CHECKING:
    from types import ModuleType

    import typer
    from prometheus_client.registry import Collector

    from trunkline.core.types import (
        Ask,
        EngineClient,
        ExpertObserver,
        Model,
        ModelInfo,
        ServedModel,
        Settings,
        Stage,
    )

    from .hooks import GrammarEngine

EXTENSION_HOOKS = ("trunkline_logits_processors", "trunkline_stop_conditions", "trunkline_grammar_engines")


@hookimpl
def trunkline_hookspecs() -> ModuleType:
    from . import hooks

    return hooks


@hookimpl
def trunkline_settings() -> SettingsGroup:
    return SettingsGroup(GROUP, GenerationSettings, per_model=True)


@hookimpl
def trunkline_serves(model: ModelInfo) -> Serves:
    if not (model.causal and model.architecture.endswith(("ForCausalLM", "LMHeadModel"))):
        return Serves(TASK, "no", f"{model.architecture} has no language model head; serve a …ForCausalLM checkpoint.")
    if (Path(model.path) / "modules.json").is_file():
        reason = "The folder is a sentence-transformers model; add `--task generation` to generate with it (too)."
        return Serves(TASK, "on_request", reason)
    return Serves(TASK, "default")


@hookimpl
def trunkline_stages(model: Model, settings: Settings, ask: Ask) -> Iterable[Stage]:
    from .grammar.engines import choose_engine
    from .grammar.grammars import Grammars
    from .sampling.extensions import Extensions
    from .stage import GenerationStage

    processors, conditions, engines = (ask(hook, model=model, settings=settings) for hook in EXTENSION_HOOKS)
    compiler = choose_engine(engines, settings[GROUP].grammar_backend, model.info.vocab_size)
    grammars = Grammars(model, compiler)
    return [
        GenerationStage(model, model.backend.sample, model.backend.adjust, Extensions(processors, conditions), grammars)
    ]


@hookimpl
def trunkline_grammar_engines(model: Model, settings: Settings) -> Iterable[GrammarEngine]:
    from .grammar.llguidance_engine import engine_of
    from .sampling.finish import end_ids_of

    if model.tokenizer is None:
        return []
    return [engine_of(model.tokenizer, model.info.vocab_size, end_ids_of(model))]


@hookimpl
def trunkline_expert_observers(model: Model, settings: Settings) -> Iterable[ExpertObserver]:
    from .sampling.routed_experts import RoutedExpertsCapturer

    assert model.expert_layers is not None  # core calls this hook for such models only
    return [RoutedExpertsCapturer(model.expert_layers)]


@hookimpl
def trunkline_routes(engine: EngineClient, settings: Settings) -> Iterable[Any]:
    from .native.routes import generate_routes
    from .openai.chat_routes import chat_routes
    from .openai.completion_routes import completion_routes
    from .responses.routes import responses_routes
    from .service import Service

    service = Service(engine, settings)
    openai = [*completion_routes(service), *chat_routes(service), *responses_routes(service)]
    return [*generate_routes(service), *openai]


@hookimpl
def trunkline_info(model: ServedModel, settings: Settings) -> dict[str, Any]:
    from .formats.choose import check_names
    from .service import read_preferred

    limit = {"max_req_input_len": input_limit(model)} if TASK in model.tasks else {}
    preferred = settings[GROUP].preferred_sampling_params
    read_preferred(preferred)  # so that invalid parameters stop the start
    check_names(settings[GROUP].tool_call_parser, settings[GROUP].reasoning_parser)
    return {"preferred_sampling_params": preferred, **limit}


@hookimpl
def trunkline_metrics() -> Iterable[Collector]:
    from .metrics import TokenMetrics

    return [TokenMetrics()]


@hookimpl
def trunkline_commands(app: typer.Typer) -> None:
    from .command import chat

    app.command()(chat)
