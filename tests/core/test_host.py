from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from msgspec import Struct

from trunkline.core.discovery import CORE, Plugin
from trunkline.core.errors import ModelError, PluginError, RequestError, TrunklineError
from trunkline.core.hookspecs import hookimpl, hookspec
from trunkline.core.host import Host
from trunkline.core.types import (
    Head,
    ModelInfo,
    ModelSource,
    RequestObserver,
    ServedModel,
    Serves,
    SettingsGroup,
    Stage,
    Transform,
)

MakePlugin = Callable[..., Plugin]

MODEL = ModelInfo(path="", architecture="A", model_type="a", context_length=8, vocab_size=9, hidden_size=4, causal=True)
SERVED = cast(ServedModel, None)


class Good(Struct, frozen=True):
    level: int = 1


def quarantine_of(*plugins: Plugin) -> str:
    """The one error in quarantine."""
    [(_, error)] = Host(plugins).quarantined.values()
    return str(error)


class FakeStage(Stage):
    task = "shout"
    params = result = Good

    def admit(self, request: Any) -> Any: ...
    def launch(self, part: Any, hidden: Any) -> Any: ...
    def collect(self, part: Any, tensors: Any) -> Any: ...
    def probe(self) -> Any: ...


class OtherStage(FakeStage):
    task = "whisper"


# -- loading ---------------------------------------------------------------------------------


def test_a_broken_import_is_quarantined_and_the_rest_works(plugin: MakePlugin) -> None:
    host = Host([Plugin("broken", "no.such.module"), plugin("good", trunkline_info=lambda: {"a": 1})])
    assert list(host.plugins) == ["good"]
    assert "ModuleNotFoundError" in str(host.quarantined["broken"][1])
    assert host.info(SERVED, {}) == {"a": 1}


def test_a_broken_import_is_fatal_when_asked_for_by_name() -> None:
    with pytest.raises(PluginError, match=r"'broken'.*can't be imported"):
        Host([Plugin("broken", "no.such.module")], required=["broken"])


def test_a_module_that_raises_anything_at_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exploding_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "ZeroDivisionError" in quarantine_of(Plugin("boom", "exploding_plugin"))
    assert "exploding_plugin" not in sys.modules


def test_an_unknown_hook_is_named_with_the_likely_one(plugin: MakePlugin) -> None:
    error = quarantine_of(plugin("typo", trunkline_setings=lambda: None))
    assert "'typo'" in error
    assert "trunkline_setings; did you mean trunkline_settings?" in error


def test_a_wrong_argument_name_is_named(plugin: MakePlugin) -> None:
    error = quarantine_of(plugin("args", trunkline_serves=lambda checkpoint: None))
    assert "'args'" in error
    assert "checkpoint" in error


def test_an_unmarked_hook_is_named(plugin: MakePlugin) -> None:
    assert "isn't marked with @hookimpl" in quarantine_of(plugin("bare", mark=False, trunkline_settings=lambda: None))


def test_wrappers_are_refused(plugin: MakePlugin) -> None:
    found = plugin("wrap")
    assert found.module is not None

    @hookimpl(wrapper=True)
    def trunkline_settings() -> Iterator[None]:
        return (yield)

    vars(found.module)["trunkline_settings"] = trunkline_settings
    assert "nothing to wrap" in quarantine_of(found)


def test_a_plugin_that_fails_to_register_leaves_nothing_behind(plugin: MakePlugin) -> None:
    def settings() -> SettingsGroup:
        raise AssertionError("a quarantined plugin was asked")

    host = Host([plugin("bad", trunkline_settings=settings, trunkline_serves=lambda wrong: None)])
    assert host.settings() == {}
    assert "bad" in host.quarantined


def test_plugins_define_hooks_for_plugins(plugin: MakePlugin) -> None:
    specs = ModuleType("specs")

    @hookspec
    def trunkline_volume(text: str) -> int:  # type: ignore[empty-body]
        """How loud."""

    specs.trunkline_volume = trunkline_volume  # type: ignore[attr-defined]
    # "a" is loaded before and after "z" defines the hook: order doesn't matter
    host = Host([plugin("a", trunkline_volume=lambda text: len(text)), plugin("z", trunkline_hookspecs=lambda: specs)])
    assert not host.quarantined, host.quarantined
    assert list(host.ask("trunkline_volume", text="abc")) == [("a", 3)]


# -- asking ----------------------------------------------------------------------------------


def test_wrong_answers_and_exceptions_carry_the_plugins_name(plugin: MakePlugin) -> None:
    def broken() -> Any:
        raise ValueError("what now")

    for function, words in ((lambda: 3, "answered with int, not SettingsGroup"), (broken, "ValueError: what now")):
        with pytest.raises(PluginError, match=rf"^plugin 'guilty'.*{words}"):
            Host([plugin("innocent"), plugin("guilty", trunkline_settings=function)]).settings()


def test_an_exception_inside_a_generator_is_blamed_too(plugin: MakePlugin) -> None:
    def stages(model: Any, settings: Any) -> Iterator[Stage]:
        yield FakeStage()
        raise KeyError("later")

    with pytest.raises(PluginError, match=r"'lazy'.*KeyError"):
        Host([plugin("lazy", trunkline_stages=stages)]).stages(cast(Any, None), {}, ["shout"])


@pytest.mark.field
@pytest.mark.parametrize("error", [SystemExit, GeneratorExit])
def test_a_hook_that_exits_is_blamed_with_its_distribution(plugin: MakePlugin, error: type[BaseException]) -> None:
    def settings() -> None:
        raise error

    def stages(model: Any, settings: Any) -> Iterator[Stage]:
        yield FakeStage()
        raise error

    found = plugin("quits", trunkline_settings=settings, trunkline_stages=stages)
    found.distribution, found.version = "quits-dist", "2.0"
    host = Host([found])
    with pytest.raises(PluginError, match=rf"^plugin 'quits' \(quits-dist 2.0\): .*{error.__name__}"):
        host.settings()
    with pytest.raises(PluginError, match=rf"^plugin 'quits' \(quits-dist 2.0\): .*{error.__name__}"):
        host.stages(cast(Any, None), {}, ["shout"])


@pytest.mark.field
def test_a_module_that_exits_when_it_is_imported_is_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quitting_plugin.py").write_text("import sys; sys.exit(1)")
    monkeypatch.syspath_prepend(tmp_path)
    host = Host([Plugin("quits", "quitting_plugin")])
    assert "SystemExit" in str(host.quarantined["quits"][1])


@pytest.mark.field
@pytest.mark.parametrize("attributes", [{"task": None}, {"params": dict}, {"result": None}, {"params": Good("x")}])
def test_a_stage_without_its_class_attributes_is_named(plugin: MakePlugin, attributes: dict[str, Any]) -> None:
    stage = type("Odd", (FakeStage,), attributes)()
    with pytest.raises(PluginError, match=r"'odd'.*Odd\.(task|params|result) must be"):
        Host([plugin("odd", trunkline_stages=lambda: [stage])]).stages(cast(Any, None), {}, ["shout"])


@pytest.mark.field
def test_a_control_that_is_no_function_is_named(plugin: MakePlugin) -> None:
    with pytest.raises(PluginError, match="the control 'c' is 5, not a function"):
        Host([plugin("odd", trunkline_controls=lambda: {"c": 5})]).controls()


def test_errors_made_for_users_pass_unchanged(plugin: MakePlugin) -> None:
    def resolve(reference: str) -> ModelSource:
        raise ModelError("no room")

    with pytest.raises(ModelError, match=r"^no room$"):
        Host([plugin("disk", trunkline_resolve_model=resolve)]).resolve_model("x")


def test_settings_are_asked_once(plugin: MakePlugin) -> None:
    host = Host([plugin("a", trunkline_settings=lambda: SettingsGroup("a", Good))])
    host.settings()
    before = host.hook_calls
    assert list(host.settings()) == ["a"]
    assert host.hook_calls == before > 0


class Required(Struct, frozen=True):
    level: int


class Mutable(Struct):
    level: int = 1


@pytest.mark.parametrize(("schema", "words"), [(Required, "'level' has no default"), (Mutable, "must be frozen")])
def test_settings_structs_are_frozen_and_have_defaults(plugin: MakePlugin, schema: type[Struct], words: str) -> None:
    with pytest.raises(PluginError, match=words):
        Host([plugin("a", trunkline_settings=lambda: SettingsGroup("a", schema))]).settings()


def test_what_two_plugins_claim_is_an_error(plugin: MakePlugin) -> None:
    def twice(**functions: Callable[..., Any]) -> Host:
        return Host([plugin("one", **functions), plugin("two", **functions)])

    with pytest.raises(PluginError, match="settings group 'a'"):
        twice(trunkline_settings=lambda: SettingsGroup("a", Good)).settings()
    with pytest.raises(PluginError, match="task 'shout'"):
        twice(trunkline_serves=lambda: Serves("shout", "default")).serves(MODEL, {})
    with pytest.raises(PluginError, match="task 'shout'"):
        twice(trunkline_stages=lambda: [FakeStage()]).stages(cast(Any, None), {}, ["shout"])
    with pytest.raises(PluginError, match="control 'c'"):
        twice(trunkline_controls=lambda: {"c": print}).controls()
    with pytest.raises(PluginError, match="info key 'k'"):
        twice(trunkline_info=lambda: {"k": 1}).info(SERVED, {})


def test_heads_are_asked_of_the_active_tasks_plugins_only(plugin: MakePlugin) -> None:
    def make(task: str) -> Plugin:
        return plugin(
            f"p_{task}",
            trunkline_serves=lambda: Serves(task, "default"),
            trunkline_heads=lambda: [Head(task, build=lambda model: model)],
        )

    host = Host([make("shout"), make("whisper")])
    assert set(host.serves(MODEL, {})) == {"shout", "whisper"}
    assert [head.name for head in host.heads(MODEL, {}, ["whisper"])] == ["whisper"]


def test_cores_own_heads_are_for_every_task(plugin: MakePlugin) -> None:
    core = plugin(CORE, trunkline_heads=lambda: [Head("score", build=lambda model: model)])
    shout = plugin("shout", trunkline_serves=lambda: Serves("shout", "default"))
    host = Host([core, shout])
    host.serves(MODEL, {})
    assert [head.name for head in host.heads(MODEL, {}, ["shout"])] == ["score"]


def test_transforms_of_core_come_last(plugin: MakePlugin) -> None:
    def own(name: str) -> Any:
        return lambda: [Transform(name, lambda names, weight: None, error=0.1)]

    core = plugin(CORE)
    assert core.module is not None
    core.module.trunkline_transforms = hookimpl(trylast=True)(own("core"))
    host = Host([core, *(plugin(name, trunkline_transforms=own(name)) for name in ("zeta", "alpha"))])
    found = host.transforms(MODEL, {})
    assert {one.plugin.name for one in found} == {CORE, "zeta", "alpha"}
    assert found[-1].value.name == "core"


def test_serves_has_three_answers(plugin: MakePlugin) -> None:
    with pytest.raises(PluginError, match="'maybe'"):
        Host([plugin("p", trunkline_serves=lambda: Serves("shout", "maybe"))]).serves(MODEL, {})


def test_stages_of_inactive_tasks_are_dropped(plugin: MakePlugin) -> None:
    host = Host([plugin("p", trunkline_stages=lambda: [FakeStage(), OtherStage()])])
    assert list(host.stages(cast(Any, None), {}, ["whisper"])) == ["whisper"]


def test_the_first_answer_wins_and_trylast_is_last(plugin: MakePlugin) -> None:
    core = plugin("models")
    assert core.module is not None

    @hookimpl(trylast=True)
    def trunkline_resolve_model(reference: str) -> ModelSource:
        return ModelSource(reference, "/core")

    vars(core.module)["trunkline_resolve_model"] = trunkline_resolve_model

    def resolve(reference: str) -> ModelSource | None:
        return ModelSource(reference, "/mine") if reference.startswith("mine:") else None

    for name in ("a", "z"):
        host = Host([core, plugin(name, trunkline_resolve_model=resolve)])
        assert host.resolve_model("mine:x").path == "/mine"
        assert host.resolve_model("x").path == "/core"


def test_a_list_of_tensors_is_one_answer(plugin: MakePlugin) -> None:
    tensors: list[Any] = [("a", 1), ("b", 2)]
    host = Host([plugin("p", trunkline_weights=lambda: tensors)])
    assert host.weights(ModelSource("", "")) is tensors


def test_a_plugins_tokenizer_is_used(plugin: MakePlugin) -> None:
    tokenizer = object()
    host = Host([plugin("p", trunkline_tokenizer=lambda source: tokenizer)])
    assert host.tokenizer(ModelSource("x", "/x")) is tokenizer


def test_nobody_answers() -> None:
    host = Host()
    assert host.tokenizer(ModelSource("x", "/x")) is None
    with pytest.raises(ModelError, match="No model 'x'"):
        host.resolve_model("x")
    with pytest.raises(ModelError, match="/x"):
        host.weights(ModelSource("x", "/x"))


def test_routes_come_with_their_plugin(plugin: MakePlugin) -> None:
    host = Host([plugin("a", trunkline_routes=lambda engine: [1, 2]), plugin("b", trunkline_routes=lambda: [3])])
    assert host.routes(cast(Any, None), {}) == [("a", 1), ("a", 2), ("b", 3)]
    assert host.routes(cast(Any, None), {}, of=["b"]) == [("b", 3)]


def test_app_config_and_commands_are_handed_over(plugin: MakePlugin) -> None:
    seen: list[Any] = []
    host = Host([plugin("a", trunkline_app_config=lambda config: seen.append(config))])
    host.app_config(cast(Any, "config"))
    assert seen == ["config"]


def test_one_plugins_failing_commands_do_not_take_the_others(
    plugin: MakePlugin, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(app: Any) -> None:
        raise RequestError("no") if app is None else ValueError("no")

    seen: list[Any] = []
    host = Host([plugin("a", trunkline_commands=broken), plugin("b", trunkline_commands=lambda app: seen.append(app))])
    host.commands(cast(Any, "app"))
    assert seen == ["app"]
    assert "'a'" in caplog.text


def test_every_hook_call_is_counted(plugin: MakePlugin) -> None:
    host = Host([plugin("a", trunkline_controls=lambda: {}), plugin("b", trunkline_controls=lambda: {})])
    before = host.hook_calls
    host.controls()
    assert host.hook_calls == before + 2


# -- what is installed -----------------------------------------------------------------------


def test_the_projects_own_plugins_load_through_entry_points() -> None:
    host = Host.load()
    assert {"models", "generation"} <= set(host.plugins)
    assert host.plugins["models"].distribution == "trunkline"


def test_expert_observers_of_all_plugins_are_collected(plugin: MakePlugin) -> None:
    asked: list[Any] = []

    def observers(model: Any, settings: Any) -> list[str]:
        asked.append((model, settings))
        return ["first", "second"]

    host = Host(
        [plugin("a", trunkline_expert_observers=observers), plugin("b", trunkline_expert_observers=lambda: ["third"])]
    )
    found = [(one.plugin.name, one.value) for one in host.expert_observers(cast(Any, "model"), {})]
    assert sorted(found) == [("a", "first"), ("a", "second"), ("b", "third")]
    assert asked == [("model", {})]
    wrong = Host([plugin("wrong", trunkline_expert_observers=lambda: 5)])
    with pytest.raises(PluginError, match=r"'wrong'.*int, not Iterable"):
        wrong.expert_observers(cast(Any, None), {})


def test_request_observers_and_collectors_come_with_their_plugin(plugin: MakePlugin) -> None:
    observers = {name: RequestObserver() for name in "ab"}
    collectors = {name: object() for name in "ab"}
    host = Host([
        plugin(
            name,
            trunkline_request_observers=lambda settings, name=name: [observers[name]] if settings else [],
            trunkline_metrics=lambda name=name: [collectors[name]],
        )
        for name in "ab"
    ])  # fmt: skip
    assert {one.plugin.name: one.value for one in host.request_observers({"any": Good()})} == observers
    assert host.request_observers({}) == ()
    assert {one.plugin.name: one.value for one in host.metrics({})} == collectors
    wrong = Host([plugin("wrong", trunkline_request_observers=lambda: [5])])
    with pytest.raises(PluginError, match=r"'wrong'.*int, not RequestObserver"):
        wrong.request_observers({})


def test_plugins_ask_hooks_that_plugins_have_specified(plugin: MakePlugin) -> None:
    specified = ModuleType("shout_hooks")

    def trunkline_shouters(model: str) -> list[str]: ...

    trunkline_shouters.__module__ = specified.__name__
    specified.trunkline_shouters = hookspec(trunkline_shouters)  # type: ignore[attr-defined]
    asked: list[Any] = []
    host = Host([
        plugin("shout", trunkline_hookspecs=lambda: specified, trunkline_routes=lambda ask: asked.append(ask) or []),
        plugin("loud", trunkline_shouters=lambda model: [f"{model}!", f"{model}!!"]),
    ])  # fmt: skip
    assert host.routes(cast(Any, None), {}) == []
    [ask] = asked
    assert [(one.plugin.name, one.value) for one in ask("trunkline_shouters", model="m")] == [
        ("loud", "m!"),
        ("loud", "m!!"),
    ]
    assert "loud" in str(ask("trunkline_shouters", model="m")[0].failed("fell silent"))
    for hook in ("trunkline_stages", "trunkline_whispers"):
        with pytest.raises(TrunklineError, match="no plugin has specified"):
            ask(hook)
