"""Two nodes of Ray on this machine, the first with two places for engines and the second with one.

Run by an interpreter that has Ray. Prints a line of JSON with the first node's address, and after each line of standard
input one with the second node's process: ``lose`` kills that node with all its processes, ``add`` starts it. Ends the
nodes when standard input ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psutil
from ray.cluster_utils import Cluster

MEMORY = 80 << 20  # bytes of each node's object store, which is hardly used


def raylet(node: Any) -> psutil.Process:
    """The process that is the parent of a node's actors."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray and the nodes print

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    head = {"num_cpus": 2, "resources": {"place": 2}, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second: Any = None
        reply(address=cluster.address)
        for line in sys.stdin:
            if line.strip() == "add":
                second = cluster.add_node(num_cpus=0, resources={"place": 1}, object_store_memory=MEMORY)
                reply(pid=raylet(second).pid)
            else:
                lost = raylet(second).children(recursive=True)
                cluster.remove_node(second, allow_graceful=False)
                for process in lost:
                    if process.is_running():
                        process.kill()
                reply(pid=None)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
