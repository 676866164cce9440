"""Loaded by schemathesis in test_fuzz.py: what counts as a body that must be refused.

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


document = httpx.get(os.environ["TRUNKLINE_OPENAPI"], headers={"authorization": os.environ["TRUNKLINE_KEY"]}).json()
COMPONENTS = {"components": lax(document["components"])}
VALIDATORS = {
    (method.upper(), path): jsonschema_rs.validator_for(
        COMPONENTS | lax(operation["requestBody"]["content"]["application/json"]["schema"])
    )
    for path, operations in document["paths"].items()
    for method, operation in operations.items()
    if "application/json" in operation.get("requestBody", {}).get("content", {})
}


@schemathesis.check
def wrong_bodies_are_refused(ctx: Any, response: Any, case: Any) -> None:
    try:
        negative_data_rejection(ctx, response, case)
    except Failure:
        validator = VALIDATORS.get((case.method.upper(), case.operation.path))
        if validator is None or not validator.is_valid(case.body):
            raise
