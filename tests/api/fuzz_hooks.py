"""Loaded by schemathesis in test_fuzz.py: what counts as a body that must be refused, and calls that must be undone.

Bodies are decoded laxly, as SGLang's clients expect: "1" is a number, 0 and "false" are false, "null" is null.
The document names the types that routes mean, so schemathesis's own check would report each of those.
"""

from __future__ import annotations

import os
from typing import Any

import httpx
import jsonschema_rs
import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.specs.openapi.checks import negative_data_rejection

LAX: dict[str, dict[str, Any]] = {
    "boolean": {"enum": [0, 1, "0", "1", "true", "True", "TRUE", "false", "False", "FALSE"]},
    "integer": {"type": "string", "pattern": r"^\s*[-+]?[0-9]+(\.0*)?\s*$"},
    "number": {"type": "string", "pattern": r"^\s*[-+]?([0-9.]+([eE][-+]?[0-9]+)?|[nN][aA][nN]|[iI][nN][fF].*)\s*$"},
    "null": {"type": "string", "pattern": "^[nN][uU][lL][lL]$"},
}  # fmt: skip


def lax(schema: Any) -> Any:
    """The schema of what lax decoding makes valid under ``schema``."""
    if isinstance(schema, list):
        return [lax(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: value if key in ("enum", "const", "default") else lax(value) for key, value in schema.items()}
    kind = inner.get("type")  # of a schema; in `properties` it may be a schema itself
    return {"anyOf": [inner, LAX[kind]]} if isinstance(kind, str) and kind in LAX else inner


server = httpx.Client(
    base_url=os.environ["TRUNKLINE_URL"], headers={"authorization": os.environ["TRUNKLINE_KEY"]}, timeout=60
)
document = server.get("/openapi.json").json()
COMPONENTS = {"components": lax(document["components"])}
VALIDATORS = {
    (method.upper(), path): jsonschema_rs.validator_for(
        COMPONENTS | lax(operation["requestBody"]["content"]["application/json"]["schema"])
    )
    for path, operations in document["paths"].items()
    for method, operation in operations.items()
    if "application/json" in operation.get("requestBody", {}).get("content", {})
}

# The server answers nothing more, or slowly, after the call on the left; the one on the right ends that.
UNDONE_BY: dict[str, tuple[str, Any]] = {
    "/pause_generation": ("/continue_generation", {}),
    "/release_memory_occupation": ("/resume_memory_occupation", {}),
    "/slow_down": ("/slow_down", {"forward_sleep_time": None}),
    "/start_profile": ("/stop_profile", None),
}


def undo(path: str) -> None:
    """Whatever the call's reply was: it may have had its effect before it failed."""
    if path in UNDONE_BY:
        other, body = UNDONE_BY[path]
        answer = server.post(other, json=body)
        assert answer.status_code < 500, f"{other} after {path}: {answer.status_code} {answer.text[:500]}"


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    undo(case.operation.path)


@schemathesis.hook
def after_network_error(context: Any, case: Any, request: Any) -> None:
    undo(case.operation.path)


@schemathesis.check
def wrong_bodies_are_refused(ctx: Any, response: Any, case: Any) -> None:
    try:
        negative_data_rejection(ctx, response, case)
    except Failure:
        validator = VALIDATORS.get((case.method.upper(), case.operation.path))
        if validator is None or not validator.is_valid(case.body):
            raise
