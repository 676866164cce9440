"""Observers see what transformers' own routers chose, for the passes that are theirs, and no others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.model import expert_watch
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.expert_watch import TAP, ExpertWatch, watch_experts
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.types import ExpertLayers, PassRow, Request

MIXTURES = ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "llama4"]


@dataclass
class Row:
    request: Request
    start: int
    end: int


def row_of(start: int, end: int) -> Row:
    return Row(Request(key=1, rid="", task="t", params=None, tokens=[], prompt_len=0), start, end)


@contextmanager
def observed(watching: ExpertWatch, tokens: int) -> Iterator[None]:
    """A pass over one row, whose observers are told of it at its end."""
    choices: list[tuple[int, torch.Tensor]] = []
    observers = watching.active_observers()
    with watching.noting(choices) if observers else nullcontext():
        yield
    watching.tell(observers, [row_of(0, tokens)], [True], choices)


class Notes:
    """Writes down what it is shown."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.calls: list[Any] = []
        self.rows: Sequence[PassRow] = []
        self.chosen: dict[int, torch.Tensor] = {}

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        self.calls.append("begin")
        self.rows = rows

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        self.calls.append(layer)
        self.chosen[layer] = chosen

    def end_pass(self) -> None:
        self.calls.append("end")


def watch(*observers: Any) -> ExpertWatch:
    return ExpertWatch(ExpertLayers((0, 1), 2, 8), provided(*observers))


def provided(*observers: Any) -> tuple[Provided[Any], ...]:
    return tuple(Provided(Plugin("shapes", "shapes", "shapes-dist", "2.0"), observer) for observer in observers)


def run(model: LoadedModel, ids: torch.Tensor) -> None:
    model.forward(ids, torch.arange(len(ids)), packed_layout([len(ids)]), None)


def chosen_by_routers(whole: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Decoder layer -> sorted choices ``[T, k]`` of transformers' own routers; Llama 4's are its scores above 0."""
    found: dict[int, torch.Tensor] = {}
    handles = []
    for name, module in whole.named_modules():
        if "Router" not in type(module).__name__:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])

        def note(module: Any, _: Any, output: Any, layer: int = layer) -> None:
            indices = output[2] if len(output) == 3 else output[0].nonzero()[:, 1].view(len(output[0]), -1)
            found[layer] = indices.sort(-1).values

        handles.append(module.register_forward_hook(note))
    with torch.inference_mode():
        whole(ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_choices_are_those_of_the_routers(
    load: Callable[..., LoadedModel], reference: Callable[[str], Any], name: str, backend: str
) -> None:
    model, notes = load(name, backend), Notes()
    assert watch_experts(model) is not None
    watching = watch_experts(model)  # the last one sees everything, once
    assert watching is not None
    watching.provided = provided(notes)
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(5))
    with observed(watching, len(ids)):
        run(model, ids)
    expected = chosen_by_routers(reference(name), ids)
    assert expected
    assert watching.layers == ExpertLayers(tuple(sorted(expected)), 2, 8)
    assert notes.calls == ["begin", *sorted(expected), "end"]
    for layer, indices in expected.items():
        assert torch.equal(notes.chosen[layer].sort(-1).values, indices), layer


def test_nothing_is_shown_outside_of_passes_or_to_those_who_look_away(load: Callable[..., LoadedModel]) -> None:
    model, notes = load("mixtral"), Notes(active=False)
    watching = watch_experts(model)
    assert watching is not None
    watching.provided = provided(notes)
    ids = torch.arange(5)
    with observed(watching, len(ids)):
        assert not watching.active
        run(model, ids)
    notes.active = True
    run(model, ids)
    assert notes.calls == []


def test_without_observers_experts_cost_one_look(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = watch_experts(load("mixtral"))
    assert watching is not None
    monkeypatch.setattr(ExpertWatch, "observe", lambda *_: pytest.fail("observe was called"))
    with observed(watching, 5):
        run(load("mixtral"), torch.arange(5))


def test_dense_models_are_not_watched(load: Callable[..., LoadedModel]) -> None:
    assert watch_experts(load("llama")) is None


@pytest.mark.parametrize("padded", [True, False])
def test_what_cannot_be_seen_is_said(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    model = dataclasses.replace(load("mixtral"), padded=padded)
    monkeypatch.setattr(expert_watch, "LAYER", expert_watch.re.compile("nowhere"))
    watching = watch_experts(model)
    assert watching is not None
    assert watching.layers.layers == ()
    assert ("padding" if padded else "can't be observed") in watching.layers.unseen


def test_a_pass_that_fails_is_not_told() -> None:
    notes = Notes()
    watching = watch(notes)
    with pytest.raises(ZeroDivisionError), observed(watching, 1):
        raise ZeroDivisionError
    assert notes.calls == []
    assert not watching.active


def test_rows_of_requests_that_have_ended_are_left_out() -> None:
    notes = Notes()
    watching = watch(notes)
    rows = [row_of(0, 2), row_of(0, 1), row_of(5, 8)]
    chosen = torch.arange(6)[:, None]
    watching.tell(watching.active_observers(), rows, [True, False, True], [(3, chosen)])
    assert notes.rows == [rows[0], rows[2]]
    assert notes.chosen[3][:, 0].tolist() == [0, 1, 3, 4, 5]
    notes.calls.clear()
    watching.tell(watching.active_observers(), rows, [False] * 3, [(3, chosen)])
    assert notes.calls == [], "no row is left"


def test_a_row_that_is_computed_again_is_not_told_twice() -> None:
    notes = Notes()
    watching = watch(notes)
    rows = [row_of(0, 2), row_of(0, 1)]
    watching.tell(watching.active_observers(), rows, [True, True], [(3, torch.zeros(3, 1))])
    watching.tell(watching.active_observers(), rows[1:], [True], [(3, torch.zeros(1, 1))])
    assert notes.calls == ["begin", 3, "end"]


@pytest.mark.field
@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("method", ["active", "begin_pass", "observe", "end_pass"])
def test_an_observer_that_fails_misses_the_pass_alone(
    caplog: pytest.LogCaptureFixture, method: str, error: type[BaseException]
) -> None:
    class Bad(Notes):
        def __getattribute__(self, name: str) -> Any:
            if name == method:
                raise error("a secret")
            return super().__getattribute__(name)

    good, bad = Notes(), Bad()
    watching = watch(bad, good)
    for _ in range(2):
        with observed(watching, 1):
            watching.observe(0, torch.zeros(1, 1))
    assert good.calls == ["begin", 0, "end"] * 2
    before = {"active": [], "begin_pass": [], "observe": ["begin"], "end_pass": ["begin", 0]}
    assert bad.calls == before[method] * 2
    assert f"plugin 'shapes' (shapes-dist 2.0): Bad.{method} failed and isn't called again in this pass" in caplog.text


def test_copies_of_layers_share_the_watch(load: Callable[..., LoadedModel]) -> None:
    model = load("mixtral")
    watching = watch_experts(model)
    [experts, *_] = [module for module in model.backbone.modules() if TAP in vars(module)]
    assert getattr(copy.deepcopy(experts), TAP)[0] is watching


def test_classifiers_are_watched(zoo: Callable[[str], Path]) -> None:
    from trunkline.core.model import loader
    from trunkline.core.model.sources.info import read_info
    from trunkline.core.settings import ModelSettings
    from trunkline.core.types import ModelSource
    from trunkline.kernels.backend import choose

    path = str(zoo("mixtral-score"))
    settings = ModelSettings(model_path=path, dtype="float32")
    source = ModelSource(path, path)
    model = loader.load(source, read_info(source, settings), settings, [], choose("torch_native", "cpu"))
    watching = watch_experts(model)
    assert watching is not None
    assert watching.layers.layers == (0, 1)
