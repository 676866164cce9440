"""The sections of the check of GPUs, in a dry run, and what of them only runs on a GPU, with a fake one."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")

from tests.core.engine.device.late import LateDevice
from trunkline.core.engine import startup
from trunkline.kernels import backend

pytestmark = pytest.mark.compile
# In the interpreter, masked lanes divide 0 by 0.
IGNORED = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def context(tmp_path: Path) -> Any:
    made = import_module("gpu.context").Context(dry=True, records=tmp_path / "records", ends=time.monotonic() + 600)
    made.bandwidth, made.flops = 1e9, 1e9
    return made


def records(context: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in context.records.read_text().splitlines()]


def errors(context: Any) -> list[str]:
    return [record["error"] for record in records(context) if "error" in record]


@IGNORED
def test_parity_finds_what_differs(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose results are a little wrong, and one that raises; the others are right."""
    context.small = True
    norm = import_module("gpu.parity_operations").norm
    glu = import_module("gpu.parity_operations").glu
    rms_norm = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *given: rms_norm(*given) * 1.001)
    monkeypatch.setattr(glu, "glu", lambda *_: 1 / 0)
    import_module("gpu.parity").run(context)
    found = errors(context)
    assert sorted({error.split(",")[0] for error in found}) == [
        "glu gelu", "glu gelu_tanh", "glu silu", "rms_norm", "rms_norm with residual",
    ]  # fmt: skip
    rows = [record["row"] for record in records(context) if "row" in record]
    assert {row["operation"] for row in rows if row["within bound"]} >= {
        "decode, one split", "extend, cached prefixes", "rope", "sample", "logprobs", "adjust", "kv_write", "pool",
        "expert_counts", "rope and kv_write", "rope, norm of heads and kv_write",
    }  # fmt: skip


def test_an_error_that_is_nan_is_found() -> None:
    error = import_module("gpu.item").largest_error
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert error(nan, one) == float("inf")
    assert error(one, nan) == float("inf")
    assert error(nan, nan) == 0
    assert error(torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])) == pytest.approx(0.2)
    assert error(torch.empty(0), torch.empty(0)) == 0


def test_shards_divide_the_work(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity, item = import_module("gpu.parity"), import_module("gpu.item").Item
    every = [item(str(number), "", 1.0, "", [lambda: 0.0]) for number in range(7)]
    monkeypatch.setattr(import_module("gpu.parity_attention"), "items", lambda _: every)
    monkeypatch.setattr(import_module("gpu.parity_operations"), "items", lambda _: [])
    for number in range(3):
        context.shard = (number, 3)
        parity.run(context)
    assert sorted(int(record["row"]["operation"]) for record in records(context)) == list(range(7))


def test_another_process_continues_when_the_gpu_cannot_be_used(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    module = import_module("gpu.context")
    monkeypatch.setattr(module.subprocess, "call", lambda command: started.append(command) or 3)
    monkeypatch.setattr(sys, "argv", ["worker.py", "parity", "--seconds", "100", "--skip", "1"])
    context.skip, context.device, seen = 1, torch.device("cuda"), []

    def fail() -> None:
        raise RuntimeError("illegal address")

    def measure(_: Any, name: str) -> None:
        seen.append(name)
        raise ValueError(name)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fail() if len(seen) == 2 else None)
    context.attempt("a", measure, "a")  # was made by the process before
    context.attempt("b", measure, "b")  # fails, but the GPU works
    with pytest.raises(SystemExit) as ended:
        context.attempt("c", measure, "c")
    assert (seen, ended.value.code) == (["b", "c"], 3)
    assert [error.splitlines()[0] for error in errors(context)] == ["b:", "c:"]
    assert started[0][1:8] == ["-m", "gpu.worker", "parity", "--seconds", "100", "--skip", "1"]
    assert started[0][8:11] == ["--skip", "3", "--seconds"]


def test_when_the_time_is_up_the_rest_is_left_out(context: Any) -> None:
    context.ends = time.monotonic() - 1
    context.attempt("late", lambda _: 1 / 0)
    assert records(context) == [{"note": "Left out, since the section's time was up: late."}]


@IGNORED
def test_every_kernel_is_measured(context: Any) -> None:
    """And in the table of attention, measured and predicted times are different columns."""
    for name in ("gpu.attention", "gpu.operations"):
        import_module(name).run(context)
    assert errors(context) == []
    rows = [record for record in records(context) if "row" in record]
    titles = [record["table"].split(":")[0].split(",")[0] for record in rows]
    assert {"Decode attention", "Extend attention", "Other kernels"} == set(titles)
    for record in rows:
        assert record["row"]["measured"] > 0
    assert rows[0]["row"].keys() >= {"measured", "predicted", "measured/predicted", "torch sdpa", "torch eager"}


def test_what_the_sanitizer_finds_is_an_error(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tool that runs nothing and finds something."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Invalid write'\necho '========= ERROR SUMMARY: 1 error'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sanitizer = import_module("gpu.sanitizer")
    assert sanitizer.find() == tool
    context.dry = False
    sanitizer.run(context)
    assert [error.splitlines()[0] for error in errors(context)] == [
        "memcheck, exit status 9:", "racecheck, exit status 9:",
    ]  # fmt: skip
    rows = [record["row"] for record in records(context) if "row" in record]
    assert rows[0] == {"tool": "memcheck", "checks": 0, "result": "========= ERROR SUMMARY: 1 error"}


def test_the_wheels_of_nvidia_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = import_module("gpu.sanitizer")
    tool = tmp_path / "nvidia" / "cuda_sanitizer_api" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    monkeypatch.setattr(sanitizer.site, "getsitepackages", lambda: [str(tmp_path)])
    assert tool in set(sanitizer.places())


def test_the_floor_of_a_step(tmp_path: Path) -> None:
    """Weights once, a half of the experts for one token, keys and values of each row."""
    floor = import_module("gpu.floor").Floor
    config = {
        "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    shapes = {"layers.0.mlp.experts.gate_up_proj": (4, 3, 5), "lm_head.weight": (10, 4), "norm.weight": (4,)}
    plan = SimpleNamespace(
        active_parameters=30 + 40 + 4, shapes=shapes, dtype=torch.bfloat16, kv_bytes_per_token=100, weight_bytes=1
    )
    info = SimpleNamespace(config=config, architecture="XForCausalLM", causal=True)
    lane = SimpleNamespace(candidate=SimpleNamespace(plan=plan, info=info))
    rates = SimpleNamespace(bandwidth=1000.0, flops=1e12)
    made = floor(rates, lane)
    assert made.weights(1) == 2 * 74
    assert made.weights(2) == 2 * (44 + 60 * 0.75)
    assert made.decode(2, 10) == pytest.approx((2 * (44 + 60 * 0.75) + 2 * 10 * 100) / 1000)
    rates.flops = 1.0
    assert floor(rates, lane).decode(2, 10) == pytest.approx(2 * (2 * 74 + 4 * 2 * 2 * 10))
    assert floor(rates, lane).prompt(6) == pytest.approx(2 * 34 * 6 + 2 * 40 + 4 * 2 * 2 * 18)


def test_the_first_and_last_steps_of_a_batch_do_not_count() -> None:
    turn = import_module("gpu.driver").Turn
    turns = [turn(float(number), 0.0, tokens) for number, tokens in enumerate([0, 1, 2, 2, 2, 2, 2, 2, 1, 0])]
    steps = import_module("gpu.engine").steps_of(turns, 2)
    assert [step.seconds for step in steps] == [5.0, 6.0]


class Event:
    """A mark in the order of a GPU's work; number n is recorded n² milliseconds after the first."""

    order: ClassVar[list[Event]] = []

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.order.append(self)

    def elapsed_time(self, end: Event) -> float:
        return float(self.order.index(end) ** 2 - self.order.index(self) ** 2)


def test_times_of_a_gpu_are_between_its_events(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of several calls, in seconds; the L2 cache is written before each call."""
    stopwatch = context.stopwatch
    stopwatch.gpu = True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Event.order.clear()
    dirty: list[bool] = []

    def call() -> None:
        dirty.append(bool(stopwatch._flushed.any()))
        stopwatch._flushed.fill_(1)

    monkeypatch.setattr(import_module("gpu.context"), "MOST_REPEATS", 7)
    assert stopwatch.seconds(call) == pytest.approx((9**2 - 8**2) / 1000)
    assert dirty[1:] == [False] * 8
    assert len(Event.order) == 2 * 8


def test_models_have_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, models = import_module("gpu.engine"), import_module("gpu.models")

    def layers(gib: int, sizes: dict[str, Any]) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gib << 30))
        return int(engine._fitting(sizes)["num_hidden_layers"])

    assert layers(80, models.LLAMA_8B) == 32
    assert 16 < layers(24, models.LLAMA_8B) < 32
    assert layers(80, models.QWEN3_30B_A3B) == 40
    assert layers(6, models.QWEN3_30B_A3B) == engine.LEAST_LAYERS


def test_predictions_are_those_of_this_gpu(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's GPU with the number of multiprocessors and the bandwidth of the one at hand."""
    predict = import_module("gpu.predict")
    assert predict.gpu(context) == predict.cost.GPUS["sm_90"]
    context.dry, context.bandwidth = False, 4.2e12
    monkeypatch.setattr(predict.launch, "architecture", lambda: "sm_90")
    found = SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    gpu = predict.gpu(context)
    assert (gpu.multiprocessors, gpu.bandwidth, gpu.launch) == (114, 4.2e12, predict.cost.GPUS["sm_90"].launch)


def test_prompts_without_a_cached_prefix_have_a_prediction(context: Any) -> None:
    predict, cases = import_module("gpu.predict"), import_module("gpu.cases")
    heads = cases.Heads(4, 2, 16, 16)

    def predicted(lengths: list[int], new: list[int], dtype: torch.dtype) -> float | None:
        found: float | None = predict.extend(context, cases.Case.build(heads, lengths, new, dtype, context.device))
        return found

    short, long = (predicted([n], [n], torch.bfloat16) for n in (16, 4096))
    assert short is not None
    assert long is not None
    assert 0 < short < long
    others = (([16], [8], torch.bfloat16), ([16, 16], [16, 16], torch.bfloat16), ([16], [16], torch.float32))
    assert [predicted(*one) for one in others] == [None] * 3


@IGNORED
def test_the_engine_decodes_and_embeds(context: Any) -> None:
    """Random weights, with a mixture of experts; the requests go through the engine's own loop."""
    engine = import_module("gpu.engine")
    engine.mixture(context)
    engine.embedding(context)
    assert errors(context) == []
    rows = [record for record in records(context) if "row" in record]
    served = [one["row"] for one in rows if one["table"] == "Served"]
    assert [one["architecture"] for one in served] == ["Qwen3MoeForCausalLM", "BertModel"]
    assert all(one["backend"] == "triton" for one in served)
    decoded = [one["row"] for one in rows if one["table"].startswith("Decoding")]
    assert [(one["requests"], one["graphs"]) for one in decoded] == [(1, "on"), (3, "on"), (1, "off"), (3, "off")]
    assert all(one["steps"] >= 1 and 0 < one["host"] <= one["measured"] for one in decoded)
    prompts = [one["row"] for one in rows if one["table"].startswith("Prompts")]
    assert prompts[1]["cached tokens"] == 3 * 20
    equal = [one["row"] for one in rows if one["table"] == "Equal greedy tokens"]
    assert [one["share"] for one in equal] == [1.0] * 3  # on a CPU, all variants are the same
    assert "texts" in prompts[2]["scenario"]


def test_graphs_and_overlap_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device that is late, and graphs of torch's operations. Tokens are the same; waits are measured."""
    models, engine = import_module("gpu.models"), import_module("gpu.engine")
    monkeypatch.setattr(backend, "TORCH_NATIVE", replace(backend.TORCH_NATIVE, captures=True))
    monkeypatch.setattr(startup, "choose_device", lambda name, **given: LateDevice(**given))
    models.write_config(tmp_path, "LlamaForCausalLM", models.TINY, torch.float32)
    driver = import_module("gpu.driver").Driver(
        tmp_path, models, dtype="float32", threads=1, attention_backend="torch_native", skip_tokenizer_init=True,
        max_running_requests=4, max_total_tokens=512,
    )  # fmt: skip
    device = driver.lane.runner.device
    prompts, params = [[5, 6, 7], [8, 9]], engine._params(6)
    seen = []
    for graphs, overlap in engine.VARIANTS:
        replays, device.in_flight = device.replays, 0
        driver.choose(graphs=graphs, overlap=overlap)
        outcome = driver.run("generation", prompts, params)
        assert (device.replays > replays) is graphs
        assert (device.in_flight > 0) is overlap
        assert all(0 < turn.host <= turn.seconds for turn in outcome.turns)
        assert any(turn.waited > 0 for turn in outcome.turns)
        assert sum(turn.tokens for turn in outcome.turns) == 12
        seen.append(outcome.tokens)
    assert seen == [seen[0]] * 4
    assert [len(tokens) for tokens in seen[0]] == [6, 6]
