"""Files of dumps: SGLang's layouts, readable without unpickling classes, the same numbers as the JSON."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.moe_stats import dump as dump_module
from trunkline.plugins.moe_stats import offline
from trunkline.plugins.moe_stats.records import forward_mode

PROMPTS = [[11, 7, 301, 44, 5, 90, 17], [400, 3, 77]]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}


def read(report: dict[str, Any]) -> Any:
    return torch.load(report["file"], weights_only=True)


def counts_of(report: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([layer["counts"] for layer in report["layers"]])


def test_stat(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    engine = engine_of("deepseek-v3")
    offline.start(engine)
    generate(engine, PROMPTS, **GREEDY)
    before = offline.look(engine)
    report = offline.dump(engine)
    path = Path(report["file"])
    assert path.parent == tmp_path / "dumps"
    assert path.name.startswith("expert_distribution_recorder_")
    assert [path.name] == os.listdir(path.parent)
    assert {key: report[key] for key in before} == before
    contents = read(report)
    assert set(contents) == {"rank", "logical_count", "average_utilization_rate_over_window"}
    counts = contents["logical_count"]
    assert (counts.shape, counts.dtype) == ((1000, 2, 8), torch.int64)
    assert counts.sum(0).tolist() == [[0] * 8, counts_of(report)[0].tolist()]  # the first layer is dense
    assert counts[report["passes"] :].sum() == 0
    assert all(step.sum() for step in counts[: report["passes"]])


def test_dump_forgets_and_goes_on(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral", expert_distribution_recorder_buffer_size=-1)
    assert read(offline.dump(engine))["logical_count"].shape == (0, 2, 8)
    offline.start(engine)
    generate(engine, PROMPTS, **GREEDY)
    offline.dump(engine)
    assert (offline.look(engine)["tokens"], offline.look(engine)["recording"]) == (0, True)
    generate(engine, [[5]], **GREEDY)
    report = offline.dump(engine)
    assert report["tokens"] == 4
    assert read(report)["logical_count"].shape == (4, 2, 8)


def test_starting_again_forgets_and_warns(engine_of: Callable[..., Engine], caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of("mixtral")
    offline.stop(engine)
    assert "/start_expert_distribution_record" in caplog.text
    offline.start(engine)
    generate(engine, PROMPTS, **GREEDY)
    assert offline.start(engine)["tokens"] == 0
    assert "was on already" in caplog.text
    assert offline.look(engine)["recording"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_full_buffer_loses_no_count(engine_of: Callable[..., Engine], size: int) -> None:
    engine = engine_of("mixtral", expert_distribution_recorder_buffer_size=size)
    offline.start(engine)
    generate(engine, [[5]], **{**GREEDY, "max_new_tokens": 7})
    report = offline.dump(engine)
    counts = read(report)["logical_count"]
    assert counts.shape == (size, 2, 8)
    assert counts.sum(0).tolist() == counts_of(report).tolist()
    assert counts.sum((1, 2)).tolist() == [4 * (8 - size), *[4] * (size - 1)]  # 7 passes, a token each, 2 x 2 choices


def test_per_pass(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral", expert_distribution_recorder_mode="per_pass")
    assert read(offline.dump(engine))["records"] == []
    offline.start(engine)
    generate(engine, PROMPTS, **GREEDY)
    report = offline.dump(engine)
    assert report["file"].endswith("_0.pt")
    contents = read(report)
    assert set(contents) == {"records", "last_physical_to_logical_map"}
    assert contents["last_physical_to_logical_map"].tolist() == [list(range(8))] * 2
    records = contents["records"]
    assert [set(record) for record in records] == [
        {"forward_pass_id", "rank", "gatherer_key", "global_physical_count"}
    ] * report["passes"]
    assert len({record["forward_pass_id"] for record in records}) == len(records)
    assert sum(record["global_physical_count"] for record in records).tolist() == counts_of(report).tolist()


def test_per_token(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("deepseek-v2", expert_distribution_recorder_mode="per_token", chunked_prefill_size=4)
    offline.start(engine)
    tickets = generate(engine, PROMPTS, **GREEDY)
    report = offline.dump(engine)
    lengths_of = {ticket["meta_info"]["id"]: len(prompt) for ticket, prompt in zip(tickets, PROMPTS, strict=True)}
    seen: dict[str, dict[int, int]] = {}
    modes = set()
    total = torch.zeros(2, 8, dtype=torch.int64)
    for record in read(report)["records"]:
        choices = record["topk_ids_of_layer"]
        tokens = len(record["input_ids"])
        assert choices.shape == (2, tokens, 8)
        assert (choices[0] == -1).all()  # dense
        assert (choices[1, :, :2] >= 0).all()
        assert (choices[1, :, 2:] == -1).all()
        counts = torch.bincount(choices[1, :, :2].flatten(), minlength=8)
        assert counts.tolist() == record["global_physical_count"][1].tolist()
        total[1] += counts
        lengths = record["extend_seq_lens"] or [1] * tokens
        assert sum(lengths) == tokens == len(record["positions"])
        starts = [sum(lengths[:row]) for row in range(len(lengths))]
        decoding = {
            record["positions"][start] >= lengths_of[rid] for start, rid in zip(starts, record["rids"], strict=True)
        }
        assert record["forward_mode"] == (3 if len(decoding) == 2 else 2 if decoding == {True} else 1)
        assert (record["extend_seq_lens"] is None) == (decoding == {True})
        modes.add(record["forward_mode"])
        owners = [rid for rid, length in zip(record["rids"], lengths, strict=True) for _ in range(length)]
        for rid, position, token in zip(owners, record["positions"], record["input_ids"], strict=True):
            assert position not in seen.setdefault(rid, {})
            seen[rid][position] = token
    assert total[1].tolist() == counts_of(report)[0].tolist()
    expected = {
        ticket["meta_info"]["id"]: dict(enumerate([*prompt, *ticket["output_ids"][:-1]]))
        for ticket, prompt in zip(tickets, PROMPTS, strict=True)
    }
    assert seen == expected
    assert modes >= {1, 2}


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_records_stop_at_the_limit_and_counts_go_on(engine_of: Callable[..., Engine], mode: str) -> None:
    engine = engine_of("mixtral", expert_distribution_recorder_mode=mode, expert_record_bytes=1 << 16)
    offline.start(engine)
    generate(engine, [[5]], **{**GREEDY, "max_new_tokens": 100})
    report = offline.dump(engine)
    kept = len(read(report)["records"])
    assert 0 < kept < 100
    assert report["passes_without_record"] == 100 - kept
    assert report["tokens"] == 100


def test_the_folder_of_the_environment(engine_of: Callable[..., Engine], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(tmp_path / "theirs"))
    engine = engine_of("mixtral", expert_dump_dir="")
    path = Path(offline.dump(engine)["file"])
    assert path.parent == tmp_path / "theirs"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_else_a_private_folder(
    engine_of: Callable[..., Engine], tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", raising=False)
    monkeypatch.setattr(dump_module.tempfile, "tempdir", str(tmp_path))
    dump_module._private_folder.cache_clear()
    caplog.set_level("INFO")
    engine = engine_of("mixtral", expert_dump_dir="")
    folder = Path(offline.dump(engine)["file"]).parent
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(folder) in caplog.text
    assert Path(offline.dump(engine)["file"]).parent == folder
    dump_module._private_folder.cache_clear()


def test_a_dump_that_cannot_be_written_loses_nothing(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = engine_of("mixtral", expert_dump_dir=str(tmp_path / "file"))
    offline.start(engine)
    generate(engine, [[5, 6]], **GREEDY)
    with pytest.raises(RequestError, match="can't be written") as caught:
        offline.dump(engine)
    assert caught.value.status == 500
    assert offline.look(engine)["tokens"] == 5


def test_files_are_for_their_owner_alone_in_any_folder(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    report = offline.dump(engine_of("mixtral", expert_dump_dir=str(shared)))
    assert stat.S_IMODE(Path(report["file"]).stat().st_mode) == 0o600


def test_a_swept_private_folder_is_made_again(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dump_module._private_folder.cache_clear()
    engine = engine_of("mixtral", expert_dump_dir="")
    try:
        first = Path(offline.dump(engine)["file"])
        shutil.rmtree(first.parent)
        second = Path(offline.dump(engine)["file"])
        assert second.is_file()
        assert stat.S_IMODE(second.parent.stat().st_mode) == 0o700
    finally:
        dump_module._private_folder.cache_clear()


@pytest.mark.parametrize(
    ("rows", "mode"),
    [
        ([(0, 4)], 1),
        ([(9, 10)], 2),
        ([(0, 4), (9, 10)], 3),
        ([(4, 12)], 1),  # its own output again, after a retraction
        ([(3, 4)], 1),  # the last of a prompt whose beginning was cached
    ],
)
def test_what_a_pass_did(rows: list[tuple[int, int]], mode: int) -> None:
    request = SimpleNamespace(prompt_len=4)
    assert forward_mode([SimpleNamespace(request=request, start=a, end=b) for a, b in rows]) == mode  # type: ignore[misc]
