"""Write clients.md from the modules of the suite ``clients``, and from what their last runs recorded.

``python docs/generate_clients.py`` does this; ``docs/generate.py`` does so, too. A test compares them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TESTS = ROOT / "tests" / "clients"
RESULTS = ROOT / "benchmarks" / "results" / "clients.json"

PAGE = """# Clients

Programs and libraries of other projects that were run, unmodified, against a live server: of
`demo:smollm2-135m-instruct`, and of `demo:all-minilm-l6-v2` for embeddings. The page is generated from the suite
`clients` in `tests/clients`, whose last run has the date in the table; `make full` repeats it. "What ran" lists the
tests that passed.

Keys can be any text if the server has none, and so can names of models, unless the server has several
([models](models.md)). Tools need a chat template that takes tools ([tools](tools.md)).

{table}

The [fields](fields.md) of each route say what is honoured, ignored or refused.
"""


def clients() -> str:
    """The text of clients.md. LookupError if a module doesn't say which clients it runs or how they are set up."""
    results = json.loads(RESULTS.read_text())
    lines = [("client", "what ran", "what to set"), ("---", "---", "---")]
    lines += sorted(_row(module, results.get(module.stem)) for module in sorted(TESTS.rglob("test_*.py")))
    return PAGE.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines))


def _row(module: Path, result: dict[str, Any] | None) -> tuple[str, str, str]:
    constants = dict(client_constants(module))
    if missing := {"CLIENTS", "SET"} - constants.keys():
        raise LookupError(f"{module.name} has no constant {' and '.join(sorted(missing))}")
    if result is None:
        return ", ".join(constants["CLIENTS"]), "not run yet", constants["SET"]
    names = ", ".join(f"{name} {result['versions'][name] or '(not run)'}" for name in constants["CLIENTS"])
    passed = "; ".join(test.removeprefix("test_").replace("_", " ") for test in result["passed"])
    return f"{names} ({result['date']})", passed, constants["SET"]


def client_constants(module: Path) -> Iterator[tuple[str, Any]]:
    """Names and values of the module's CLIENTS and SET; modules of tests import what this script may not have."""
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("CLIENTS", "SET"):
                yield name, ast.literal_eval(node.value)


def write() -> None:
    """Rewrite the page."""
    (DOCS / "clients.md").write_text(clients())


if __name__ == "__main__":
    write()
