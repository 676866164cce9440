"""The files in deploy/, as the tools that they are for read them."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trunkline.core import cli
from trunkline.core.config import Config


@pytest.fixture(scope="session")
def deploy(repository: Path) -> Path:
    return repository / "deploy"


@pytest.fixture(scope="session")
def dockerfile(deploy: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of deploy/Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (deploy / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [(instruction, arguments) for instruction, arguments in lines]


@pytest.fixture(scope="session")
def entrypoint(dockerfile: list[tuple[str, str]]) -> list[str]:
    """The command of the images, to which a container's arguments are added."""
    (arguments,) = [arguments for instruction, arguments in dockerfile if instruction == "ENTRYPOINT"]
    command: list[str] = json.loads(arguments)
    return command


@pytest.fixture(scope="session")
def environment(dockerfile: list[tuple[str, str]]) -> dict[str, str]:
    """The variables that ENV instructions set, of all stages."""
    texts = (arguments for instruction, arguments in dockerfile if instruction == "ENV")
    return {name: value for text in texts for name, value in re.findall(r"(\w+)=(\S+)", text)}


@pytest.fixture(scope="session")
def compose(deploy: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((deploy / "compose.yaml").read_text())
    return content


def patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    """A copy of a document, changed by the operations add and replace of a JSON patch."""
    document = deepcopy(document)
    for operation in operations:
        *parents, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        target = document
        for part in parents:
            target = target[int(part) if isinstance(target, list) else part]
        assert operation["op"] in ("add", "replace")
        assert (last in target) is (operation["op"] == "replace"), operation["path"]
        target[last] = operation["value"]
    return document


@pytest.fixture(scope="session", params=["base", "gpu"])
def manifests(request: pytest.FixtureRequest, deploy: Path) -> dict[str, Any]:
    """Kind -> manifest, as `kubectl kustomize` makes them of each of the two folders, but for labels."""
    folder = deploy / "kubernetes" / request.param
    own = yaml.safe_load((folder / "kustomization.yaml").read_text())
    base = deploy / "kubernetes" / "base"
    files = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    found = {one["kind"]: one for name in files for one in yaml.safe_load_all((base / name).read_text())}
    for patch in own.get("patches", []):
        kind = patch["target"]["kind"]
        found[kind] = patched(found[kind], yaml.safe_load(patch["patch"]))
    return found


@pytest.fixture(scope="session")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    """The specification of the pods of the Deployment."""
    specification: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return specification


@pytest.fixture(scope="session")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod["containers"]
    found: dict[str, Any] = one
    return found


@pytest.fixture
def started_with(
    entrypoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], Config]:
    """The configuration of a server whose container has these arguments, and a file with keys."""
    served: list[Config] = []
    server = ModuleType("trunkline.core.server.front")
    server.serve = lambda host, config: served.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, server.__name__, server)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    keys = tmp_path / "keys.toml"
    keys.write_text('[server]\napi_key = "a"\nadmin_api_key = "b"\n')

    def run(arguments: list[str]) -> Config:
        own = [re.sub(r"^--config=\S+/keys\.toml$", f"--config={keys}", argument) for argument in arguments]
        assert own != arguments, "the keys aren't read from a file"
        command = [*entrypoint[entrypoint.index("trunkline") + 1 :], *own]
        assert cli.run(command) == 0
        return served[-1]

    return run
