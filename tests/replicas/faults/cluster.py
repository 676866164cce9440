"""Three engine replicas behind an ingress and Ray's proxy, on two nodes of Ray on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

REPLICAS = 3  # the number of places for engines that nodes.py makes
START = 300.0  # seconds
ENGINE, ACTOR, INGRESS = (
    "trunkline.core.engine.process",
    "ray::ServeReplica:trunkline:engine-0",
    ("ray::ServeReplica:trunkline:ingress"),
)


class Cluster:
    """The nodes and the application, which is ready. ``log``: the file with what the nodes and Ray's commands say."""

    def __init__(self, python: Path, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """``python``: an interpreter that has Ray. ``settings``: arguments of :func:`trunkline.core.cluster.build`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.log = folder / "log"
        self._python, self._config, self._environment = python, folder / "config.yaml", dict(environment)
        places = {"num_cpus": 0, "resources": {"place": 1}}
        self._settings = {**settings, "replicas": REPLICAS, "resources": places}
        with self.log.open("w") as sink:
            self._nodes = subprocess.Popen(
                [python, Path(__file__).parent / "nodes.py"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, env=self._environment,
            )  # fmt: skip
        try:
            self._address = self._reply()["address"]
            self.second_node("add")
            self.deploy()
            self._wait()
        except BaseException:
            self.close()
            raise

    def second_node(self, command: str) -> None:
        """Start it (``add``), or kill all its processes (``lose``)."""
        assert self._nodes.stdin is not None
        print(command, file=self._nodes.stdin, flush=True)
        self._reply()

    def deploy(self, replicas: int = REPLICAS) -> None:
        """Give the application as many replicas of the engine."""
        application = {
            "name": "trunkline",
            "route_prefix": "/",
            "import_path": "trunkline.core.cluster:build",
            "args": self._settings,
            "deployments": [{"name": "engine-0", "num_replicas": replicas}],
        }
        http = {"host": "127.0.0.1", "port": self._port}
        config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
        self._config.write_text(json.dumps(config))  # which is YAML, too
        command = [self._python, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", self._address]
        with self.log.open("a") as sink:
            subprocess.run(
                [*command, self._config], stdout=sink, stderr=sink, env=self._environment, check=True, timeout=START
            )

    def engines(self) -> list[psutil.Process]:
        return self._processes(ENGINE)

    def actors(self) -> list[psutil.Process]:
        return self._processes(ACTOR)

    def ingress(self) -> psutil.Process:
        (one,) = self._processes(INGRESS)
        return one

    def close(self) -> None:
        """End all processes."""
        assert self._nodes.stdin is not None
        assert self._nodes.stdout is not None
        self._nodes.stdin.close()
        try:
            self._nodes.wait(60)
        finally:
            self._nodes.kill()
            self._nodes.stdout.close()

    def _processes(self, words: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._nodes.pid).children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return found

    def _reply(self) -> dict[str, Any]:
        assert self._nodes.stdout is not None
        line = self._nodes.stdout.readline()
        assert line, self.log.read_text()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _wait(self) -> None:
        deadline = time.monotonic() + START
        while not is_loaded(loads(self.url)):
            assert self._nodes.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)


def loads(url: str) -> list[dict[str, Any]]:
    """The loads of the replicas that are up; none if there is no ingress."""
    try:
        reply = httpx.get(f"{url}/v1/loads", timeout=60)
    except httpx.HTTPError:
        return []
    found: list[dict[str, Any]] = reply.json()["loads"] if reply.status_code == 200 else []
    return found


def is_loaded(found: Sequence[dict[str, Any]], replicas: int = REPLICAS) -> bool:
    """Whether as many replicas are up, and have sent a heartbeat."""
    return len(found) == replicas and all(one["max_total_num_tokens"] for one in found)
