"""The check of GPUs works where there is none: its report, its processes, and each kind of section in a dry run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = "benchmarks/gpu_check.py"
# Of a section's whole report: numbers in the interpreter, where masked lanes divide 0 by 0.
IGNORED = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _beside_each_other(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another by name."""
    monkeypatch.syspath_prepend(repository / "benchmarks")  # type: ignore[no-untyped-call]


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def context(tmp_path: Path) -> Any:
    made = import_module("gpu_context").Context(dry=True, records=tmp_path / "records", ends=time.monotonic() + 600)
    made.bandwidth, made.flops = 1e9, 1e9
    return made


def records(context: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in context.records.read_text().splitlines()]


def errors(context: Any) -> list[str]:
    return [record["error"] for record in records(context) if "error" in record]


# -- the report ------------------------------------------------------------------------------


def report(*, dry: bool = False) -> Any:
    made = import_module("gpu_report").Report(dry=dry)
    made.begin("one", "One")
    return made


def test_a_table_has_the_columns_of_all_rows() -> None:
    made = report()
    made.add("one", {"table": "T", "row": {"a": 0.0, "b": True}})
    made.add("one", {"table": "T", "row": {"a": 0.00001234, "c": None, "b": False}})
    text = made.markdown()
    assert "| a | b | c |\n|---|---|---|\n| 0 | yes | - |\n| 1.23e-05 | **no** | - |" in text
    assert "| One | running | 1 |" in text
    assert not made.failed


def test_every_figure_of_a_dry_run_is_marked() -> None:
    made = report(dry=True)
    made.add("one", {"table": "T", "row": {"rows": 64, "measured": 12.3456}})
    made.add("one", {"facts": {"GPU": "none", "speed": 1234.5}})
    text = made.markdown()
    assert "| 64 | 12.3 (dry run) |" in text
    assert "* speed: 1234 (dry run)" in text
    assert "(dry run)" in text.splitlines()[0]


def test_the_file_is_named_after_the_gpu() -> None:
    made = report()
    assert made.file_name() == "gpu-unknown.md"
    made.add("one", {"facts": {"GPU": "NVIDIA H100 80GB HBM3 / (SXM)"}})
    assert made.file_name() == "gpu-nvidia-h100-80gb-hbm3-sxm.md"


# -- its processes ---------------------------------------------------------------------------

MODULE = """
import os, signal, time

def good(context):
    context.row("Good", number=1)

def raises(context):
    context.row("Before", number=2)
    raise ValueError("it went wrong")

def crashes(context):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(context):
    context.row("Hanging", number=3)
    time.sleep(600)
"""


def test_a_section_that_fails_crashes_or_hangs_ends_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu_sections.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(script, "GRACE", 0.0)
    check = script.Check(tmp_path / "out", 10, dry=True)
    for name in ("raises", "crashes", "hangs", "good"):
        check.section(name, script.Work(f"sections.{name}", name.title(), 4 if name == "hangs" else 60))
    text = check.write().read_text()
    assert check.report.failed == ["Raises", "Crashes", "Hangs"]
    assert "ValueError: it went wrong" in text
    assert "exit status -11" in text
    assert "| Hangs | killed after 4 s | 0 |" in text
    assert all(f"| number |\n|---|\n| {number} |" in text for number in (1, 2, 3)), "what was measured stays"


def test_without_time_nothing_is_started(script: ModuleType, tmp_path: Path) -> None:
    check = script.Check(tmp_path, 0.1, dry=True)
    check.section("one", script.Work("no_such_module", "One", 60))
    assert "| One | not run: no time was left | 0 |" in check.write().read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path, repository: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(repository / SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: Machine" in done.stdout
    assert "Time of attention" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-unknown.md"]


# -- its sections ----------------------------------------------------------------------------


@IGNORED
def test_parity_finds_what_differs(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose results are a little wrong, and one that raises; the others are right."""
    context.small = True
    norm = import_module("gpu_parity_operations").norm
    glu = import_module("gpu_parity_operations").glu
    rms_norm = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *given: rms_norm(*given) * 1.001)
    monkeypatch.setattr(glu, "glu", lambda *_: 1 / 0)
    import_module("gpu_parity").run(context)
    found = errors(context)
    assert sorted({error.split(",")[0] for error in found}) == [
        "glu gelu", "glu gelu_tanh", "glu silu", "rms_norm", "rms_norm with residual",
    ]  # fmt: skip
    rows = [record["row"] for record in records(context) if "row" in record]
    assert {row["operation"] for row in rows if row["within bound"]} >= {
        "decode, one split", "extend, cached prefixes", "rope", "sample", "logprobs", "adjust", "kv_write", "pool",
    }  # fmt: skip


def test_an_error_that_is_nan_is_found() -> None:
    error = import_module("gpu_item").largest_error
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert error(nan, one) == float("inf")
    assert error(one, nan) == float("inf")
    assert error(nan, nan) == 0
    assert error(torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf])) == pytest.approx(0.2)
    assert error(torch.empty(0), torch.empty(0)) == 0


def test_shards_divide_the_work(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity, item = import_module("gpu_parity"), import_module("gpu_item").Item
    every = [item(str(number), "", 1.0, "", [lambda: 0.0]) for number in range(7)]
    monkeypatch.setattr(import_module("gpu_parity_attention"), "items", lambda _: every)
    monkeypatch.setattr(import_module("gpu_parity_operations"), "items", lambda _: [])
    for number in range(3):
        context.shard = (number, 3)
        parity.run(context)
    assert sorted(int(record["row"]["operation"]) for record in records(context)) == list(range(7))


@IGNORED
def test_every_kernel_is_measured(context: Any) -> None:
    """And in the table of attention, measured and predicted times are different columns."""
    for name in ("gpu_attention", "gpu_operations"):
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
    sanitizer = import_module("gpu_sanitizer")
    assert sanitizer.find() == tool
    context.dry = False
    sanitizer.run(context)
    assert [error.splitlines()[0] for error in errors(context)] == [
        "memcheck, exit status 9:", "racecheck, exit status 9:",
    ]  # fmt: skip
    rows = [record["row"] for record in records(context) if "row" in record]
    assert rows[0] == {"tool": "memcheck", "checks": 0, "result": "========= ERROR SUMMARY: 1 error"}


def test_the_wheels_of_nvidia_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer = import_module("gpu_sanitizer")
    tool = tmp_path / "nvidia" / "cuda_sanitizer_api" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch(0o755)
    monkeypatch.setattr(sanitizer.site, "getsitepackages", lambda: [str(tmp_path)])
    assert tool in set(sanitizer.places())


def test_the_floor_of_a_step(tmp_path: Path) -> None:
    """Weights once, a half of the experts for one token, keys and values of each row."""
    from types import SimpleNamespace

    floor = import_module("gpu_floor").Floor
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
    turn = import_module("gpu_driver").Turn
    turns = [turn(float(number), 0.0, tokens) for number, tokens in enumerate([0, 1, 2, 2, 2, 2, 2, 2, 1, 0])]
    steps = import_module("gpu_engine").steps_of(turns, 2)
    assert [step.seconds for step in steps] == [5.0, 6.0]


@IGNORED
def test_the_engine_decodes_and_embeds(context: Any) -> None:
    """Random weights, with a mixture of experts; the requests go through the engine's own loop."""
    engine = import_module("gpu_engine")
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


@pytest.mark.compile
def test_the_whole_dry_run(tmp_path: Path, repository: Path) -> None:
    """Every section, each in its process."""
    command = [sys.executable, str(repository / SCRIPT), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = tmp_path.iterdir()
    summary = path.read_text().partition("\n## ")[0].partition("|---|---|---|\n")[2]
    states = [line.split(" | ")[1:] for line in summary.splitlines()]
    assert len(states) == 8
    assert all(state.startswith("done") and bad == "0 |" for state, bad in states)
