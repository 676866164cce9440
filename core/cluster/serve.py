"""``trunkline serve --replicas``: the front in this process, as without Ray, over replicas on Ray.

Ray pickles its own messages, so rule R-1 (no unpickling) protects the engine processes only: :func:`serve` doesn't call
:func:`trunkline.core.guard.forbid_pickle`, and neither do the actors (docs/security.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trunkline.core.config import Config
from trunkline.core.errors import ConfigError, ModelError, describe_error
from trunkline.core.host import Host
from trunkline.core.server.front import run_front

NO_RAY = "--replicas needs Ray, which isn't installed; run: pip install 'trunkline[ray]'."


def serve(host: Host, config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    The replicas run on the cluster of ``RAY_ADDRESS``, else on a Ray that is started for them and ends with the
    server. Errors as :func:`trunkline.core.server.front.serve`; ConfigError without Ray.
    """
    try:
        from .deployments import connection
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(NO_RAY) from None
    for model in config.models:  # here, so that downloads show their progress and are made once
        host.resolve_model(model.reference)
    with running(config) as handles:
        run_front(host, config, connection(handles))


@contextmanager
def running(config: Config) -> Iterator[Sequence[Any]]:
    """The handles of each model's replicas, which end with the block. ModelError when they can't start."""
    import ray
    from ray import serve as ray_serve

    from .deployments import engine_deployments

    count = sum(model.replicas or 1 for model in config.models)
    ours = "RAY_ADDRESS" not in os.environ
    # Ray's CPUs are only numbers. On a Ray of our own, replicas share the machine, as its user wants.
    own: dict[str, Any] = {"address": "local", "num_cpus": count + 1, "include_dashboard": False}
    gpus = 1 if config.engine.device.startswith("cuda") else 0
    resources = {"num_cpus": 1 if ours else config.engine.threads or 1, "num_gpus": gpus}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # else engines get less time than other processes: 15
    ray.init(**(own if ours else {}), logging_level="warning", namespace="serve")
    try:
        try:
            ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
            handles = [
                ray_serve.run(deployment, name=f"trunkline-{index}", route_prefix=None)
                for index, deployment in enumerate(engine_deployments(config, resources))
            ]
        except RuntimeError as error:
            raise ModelError(f"The replicas did not start: {describe_error(error)}") from error
        yield handles
    finally:
        if ours:
            ray_serve.shutdown()
        else:
            for index in range(len(config.models)):
                ray_serve.delete(f"trunkline-{index}")
        ray.shutdown()
