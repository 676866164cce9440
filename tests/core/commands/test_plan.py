"""``trunkline plan`` on folders that have a config only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trunkline.core import cli
from trunkline.core.commands.plan import parse_size
from trunkline.core.engine.device.base import Memory
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.errors import ConfigError

GIB = 1 << 30
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """Llama 3 70B with 8 of its 80 layers."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 8}))
    return str(tmp_path)


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_a_plan_that_fits(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", llama, "--served-model-name", "llama", "--device-memory", "80GiB"]) == 0
    first, head, row, total = capsys.readouterr().out.splitlines()
    assert first.startswith("memory of cuda: 80.00 GiB, 80.00 GiB available, 70.40 GiB of it")
    assert head.split()[:3] == ["model", "dtype", "weights"]
    assert row.split()[:4] == ["llama", "bfloat16", "16.66", "GiB"]
    assert "(an estimate)" in total


def test_json_has_bytes_and_counts(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--json", "--device-memory", "80GiB", llama, "--dtype", "float16"]) == 0
    plan = as_json(capsys)
    (row,) = plan["models"]
    token_bytes = 8 * 2 * 8 * 128 * 2  # layers, keys and values, heads, width, float16
    assert row["kv_bytes_per_token"] == token_bytes
    assert row["tokens"] == (plan["limit_bytes"] - plan["weight_bytes"]) // token_bytes
    assert row["full_requests"] == row["tokens"] // 131072
    assert (row["dtype"], row["pass_tokens"], plan["fits"], plan["problem"]) == ("float16", 8192, True, None)
    assert 0 < plan["activation_bytes"] < 4 * GIB


def test_flags_of_models_and_of_the_engine(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--device-memory", "80GiB", "--mem-fraction-static", "0.9", "--json")
    second = ("--model-path", llama, "--served-model-name", "b", "--context-length", "1000")
    assert cli.run(["plan", *size, llama, "--max-total-tokens", "5000", *second]) == 0
    plan = as_json(capsys)
    assert plan["limit_bytes"] == int(72 * GIB)
    assert plan["models"][0]["tokens"] == 5000
    assert [row["context"] for row in plan["models"]] == [5000, 1000]


def test_models_that_do_not_fit_exit_with_1(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", llama, "--device-memory", "16GiB"]) == 1
    done = capsys.readouterr()
    assert "16.66 GiB" in done.out  # the table is there, too
    assert "error: The weights need 16.66 GiB but 14.08 GiB of memory is free" in done.err
    assert cli.run(["plan", llama, "--device-memory", "16GiB", "--json"]) == 1
    assert as_json(capsys)["fits"] is False


def test_the_device_that_is_there_gives_the_figures(
    llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda _: Memory(64 * GIB, 60 * GIB))
    assert cli.run(["plan", llama, "--device", "cpu", "--dtype", "bfloat16", "--json"]) == 0
    plan = as_json(capsys)
    assert (plan["device"], plan["total_bytes"], plan["available_bytes"]) == ("cpu", 64 * GIB, 60 * GIB)
    assert plan["kv_bytes"] <= 4 * GIB
    assert cli.run(["plan", llama, "--device", "cuda:7"]) == 1
    assert "--device cuda:7: torch" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--device-memory", "much"], ["--device", "tpu"], ["--mem-fraction-static", "1.5"]])
def test_flags_with_wrong_values_exit_with_2(llama: str, args: list[str]) -> None:
    assert cli.run(["plan", llama, *args]) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80 gb", 80 * 10**9), ("80G", 80 * 10**9), ("1.5Mi", 3 << 19), ("7", 7), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.2.3", "80XB", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--device-memory"):
        parse_size(text)
