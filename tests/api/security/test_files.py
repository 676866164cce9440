"""Which files clients can have read and written: R-9."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest


@pytest.mark.parametrize("around", ["outside", "dots", "link", "file link", "demo", "device"])
def test_weights_come_from_the_allowed_folder_only(
    http: httpx.Client, zoo: Callable[[str], Path], folders: Path, tmp_path: Path, around: str
) -> None:
    allowed = folders / "weights"
    outside = shutil.copytree(zoo("llama"), tmp_path / "outside")
    inside = allowed / around.replace(" ", "-")
    if around == "link":
        inside.symlink_to(outside)
    elif around == "file link":
        shutil.copytree(outside, inside)
        (inside / "model.safetensors").unlink()
        (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    path = {
        "outside": str(outside),
        "dots": f"{allowed}/../../{outside.relative_to(outside.parents[1])}",
        "demo": "demo:smollm2-135m-instruct",
        "device": "/dev/zero",
    }.get(around, str(inside))
    answer = http.post("/update_weights_from_disk", json={"model_path": path})
    message = f"Failed to get weights iterator: {path} (repository not found)."
    assert (answer.status_code, answer.json()) == (
        400,
        {"success": False, "message": message, "num_paused_requests": 0},
    )
    assert http.get("/get_model_info").json()["model_path"] == str(zoo("llama"))


def test_weights_from_the_allowed_folder_are_taken(
    http: httpx.Client, zoo: Callable[[str], Path], folders: Path
) -> None:
    """Or the refusals above would say nothing. The second model is updated, so that names of the first stay."""
    folder = shutil.copytree(zoo("bert-score"), folders / "weights" / "fine")
    query = {"model": str(zoo("bert-score"))}
    answer = http.post("/update_weights_from_disk", params=query, json={"model_path": str(folder)})
    assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text


def test_dumps_go_where_the_server_says(http: httpx.Client, folders: Path, tmp_path: Path) -> None:
    elsewhere, before = tmp_path / "mine.pt", set((folders / "dumps").iterdir())
    names: dict[str, Any] = dict.fromkeys(("path", "file", "dir", "output_dir", "file_name"), str(elsewhere))
    for suffix in ("", "/../../x"):
        answer = http.post(f"/dump_expert_distribution_record{suffix}", params=names | {"model": "experts"}, json=names)
        assert answer.status_code == (404 if suffix else 200), answer.text
    assert list(tmp_path.iterdir()) == []
    (written,) = set((folders / "dumps").iterdir()) - before
    assert written.name.startswith("expert_distribution_recorder_")
