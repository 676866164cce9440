"""Write reliability.md from the fault matrices of the tests, and from the counts of their last complete runs.

``python docs/generate_reliability.py`` does this; ``docs/generate.py`` does so, too. A test compares them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TABLE = ROOT / "tests" / "api" / "faults" / "table.py"
RESULTS = ROOT / "benchmarks" / "results"
TEST, REPLICA_TEST = "tests/api/faults/test_matrix.py", "tests/replicas/faults/test_matrix.py"
GROUPS = {
    "PROCESS": "Signals to the processes",
    "PASSES": "Forward passes and memory",
    "CLIENTS": "Clients",
    "UPDATES": "Weight updates that fail",
}

PAGE = """# Reliability

What one server and [several replicas](scaling.md) do when something fails, and what their clients see. The page is
generated from the fault matrices in `tests/api/faults/table.py`. Each row is a test in
`{test}`, or `{replica_test}`
for replicas, which has the row's name as its parameter. [Operations](operations.md) describes the settings.

{groups}

## Replicas

Three engine replicas behind Ray's proxy, two of them on one node of Ray and one on another. Both nodes are on one
machine; a node that is lost is the end of all its processes, not of the network to it.

{replicas}

## What is counted

Each test causes its fault in the middle of {load}. Every request is accounted for by how it ended:

{outcomes}

Everything else is *lost*: no reply within two minutes, a stream without an end, an answer that differs from that of an
undisturbed server, a 503 without `Retry-After`, or any outcome that isn't in the fault's row. The test fails if one
request is lost. It also fails unless, after each repetition, all requests are answered when they are sent again, all
slots of the KV pool are free, and log-probabilities and vectors are the same as before the fault, bit for bit.

The kernel's out-of-memory killer isn't started, which would need a control group for the test: a process that it ends
gets SIGKILL, and this is sent. Lack of memory is simulated by a limit on the process and by the exceptions of torch and
Python.

With replicas, two clients go on sending requests until all replicas are back. At most eight requests may fail, as many
as are in flight when the fault happens, and the first request that is sent after the fault must be answered. Where the
ingress is killed, these two don't hold. Its requests include one that would take minutes, which must be aborted.

## Counts

{counts}

Replicas:

{replica_counts}
"""

COUNTS = """The last complete run: {date}, {processor}. Numbers of requests are those of all repetitions. Times
are seconds from the fault until a request that was sent after it was answered. Where the engine is restarted, its start
takes most of this time, which depends on the machine and the model (here a tiny one). After SIGTERM, the time includes
the drain and the start of another server.

{table}

`make full` repeats the run, 20 times for each fault (`TRUNKLINE_FAULT_REPETITIONS` sets another number), and writes the
counts to `benchmarks/results/`.
"""
REPLICA_COUNTS = """The last complete run: {date}, {processor}. Times are those until a request is answered by another
replica, or by the ingress that Ray has started again.

{table}
"""
NO_COUNTS = "There is no complete run yet: `make full`."


def reliability() -> str:
    """The text of reliability.md."""
    matrix = fault_table()
    groups = [f"## {title}\n\n{_faults(getattr(matrix, name))}" for name, title in GROUPS.items()]
    outcomes = [f"* *{name}*: {about}." for name, about in matrix.OUTCOMES.items()]
    return PAGE.format(
        test=TEST,
        replica_test=REPLICA_TEST,
        load=matrix.LOAD,
        groups="\n\n".join(groups),
        replicas=_faults(matrix.REPLICAS),
        outcomes="\n".join(outcomes),
        counts=_counts("reliability", matrix.FAULTS, matrix.OUTCOMES, COUNTS),
        replica_counts=_counts("replica-reliability", matrix.REPLICAS, matrix.OUTCOMES, REPLICA_COUNTS),
    )


def fault_table() -> Any:
    """The module with the fault matrix."""
    spec = importlib.util.spec_from_file_location("fault_table", TABLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _faults(faults: Iterable[Any]) -> str:
    columns = ("fault", "what the server does", "what clients see", "allowed outcomes", "settings", "name of the test")
    rows = [
        (
            fault.shown,
            fault.server,
            fault.clients,
            ", ".join(("answered", *fault.allowed)),
            fault.tuning,
            f"`{fault.name}`",
        )
        for fault in faults
    ]
    return _table(columns, rows)


def _counts(name: str, faults: Sequence[Any], every: Iterable[str], text: str) -> str:
    """The counts of the latest file of results with this name, in the text. ``every``: outcomes of all faults."""
    files = sorted(RESULTS.glob(f"{name}-*.json"))
    if not files:
        return NO_COUNTS
    run = json.loads(files[-1].read_text())
    allowed = {"answered"}.union(*(fault.allowed for fault in faults))
    outcomes = [outcome for outcome in every if outcome in allowed]
    columns = ("fault", "repetitions", *outcomes, "lost", "median time", "longest time")
    rows = []
    for fault in faults:
        if (found := run["faults"].get(fault.name)) is None:  # it is newer than the run
            rows.append((f"`{fault.name}`", "0", *[""] * (len(columns) - 2)))
            continue
        numbers = [str(found["outcomes"].get(outcome, "")) for outcome in outcomes]
        seconds = [f"{found['seconds'][which]:.2f}" for which in ("median", "max")]
        rows.append((f"`{fault.name}`", str(found["repetitions"]), *numbers, str(found["lost"]), *seconds))
    return text.format(date=run["date"], processor=run["processor"], table=_table(columns, rows)).rstrip()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def write() -> None:
    """Rewrite the page."""
    (DOCS / "reliability.md").write_text(reliability())


if __name__ == "__main__":
    write()
