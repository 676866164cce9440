"""Who gets in: R-4 (scopes), R-5 (keys), R-13 (foreign pages), for the routes of every plugin."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from trunkline.core.server.auth import Authorizer

PUBLIC = {"/health", "/ready", "/health_generate", "/ping", "/metrics", "/expert_distribution/page"}
API, ADMIN = "key-of-clients", "key-of-admins"


def operations(http: httpx.Client, key: str = "") -> list[tuple[str, str]]:
    """(method, path) of all routes, as the server itself lists them."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    paths = http.get("/openapi.json", headers=headers).json()["paths"]
    return [(method.upper(), path.replace("{name}", "x")) for path, methods in paths.items() for method in methods]


@pytest.fixture(scope="module")
def locked(live: Callable[..., Any], zoo: Callable[[str], Path], outsiders: dict[str, str]) -> Iterator[httpx.Client]:
    keys = ["--api-key", API, "--admin-api-key", ADMIN]
    server = live(*keys, "--enable-metrics", str(zoo("llama")), key=API, environment=outsiders)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_without_a_key_only_public_routes_answer(locked: httpx.Client) -> None:
    found = operations(locked, API)
    assert {"/generate", "/surprise", "/intrude/front", "/flush_cache"} <= {path for _, path in found}
    answered = {path for method, path in found if locked.request(method, path).status_code != 401}
    assert answered == PUBLIC & {path for _, path in found}


ADMINISTRATIVE = {
    "/flush_cache", "/abort_request", "/update_weights_from_disk", "/update_weights", "/update_weight_version",
    "/get_weights_by_name", "/start_expert_distribution_record", "/stop_expert_distribution_record",
    "/dump_expert_distribution_record", "/expert_distribution", "/expert_distribution/stream",
    "/plugins/x/enable", "/pause_generation", "/continue_generation", "/release_memory_occupation",
    "/resume_memory_occupation", "/update_weights_from_tensor", "/update_weights_from_distributed",
    "/update_weights_from_ipc", "/init_weights_update_group", "/destroy_weights_update_group", "/start_profile",
    "/stop_profile", "/freeze_gc", "/configure_logging", "/slow_down",
}  # fmt: skip


def test_the_clients_key_opens_all_but_admin_routes(locked: httpx.Client) -> None:
    """Of all routes that there are: a new one is infer or public, or has its place in the list."""
    headers = {"authorization": f"Bearer {API}"}
    found = operations(locked, API)
    refused = {path for method, path in found if locked.request(method, path, headers=headers).status_code == 401}
    assert refused == ADMINISTRATIVE


@pytest.mark.parametrize("path", ["/flush_cache", "/abort_request", "/update_weight_version", "/expert_distribution"])
def test_the_admins_key_opens_them(locked: httpx.Client, path: str) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    assert locked.request("GET" if "expert" in path else "POST", path, json={}, headers=headers).status_code != 401


@pytest.mark.parametrize(
    "path",
    [
        "/health/../get_server_info",
        "/health%2f..%2fget_server_info",
        "//get_server_info",
        "/metrics/../flush_cache",
        "/healthx",
        "/get_server_info/",
        "/GET_SERVER_INFO",
        "/v1/models/../../flush_cache",
    ],
)
def test_no_spelling_of_a_path_slips_by(locked: httpx.Client, path: str) -> None:
    request = httpx.Request("GET", locked.base_url.join("/"))
    request.extensions["target"] = path.encode()
    answer = locked.send(request)
    assert answer.status_code in (400, 401, 404, 405), answer.text
    assert "model_path" not in answer.text


def test_a_page_from_elsewhere_administers_nothing(http: httpx.Client) -> None:
    """No key is set: what a browser sends for another site, or under another name, is refused."""
    for headers in (
        {"origin": "http://evil.example"},
        {"host": "evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"x-forwarded-for": "10.0.0.1"},
    ):
        answer = http.post("/flush_cache", headers=headers)
        assert answer.status_code == 403, headers
        assert "--admin-api-key" in answer.json()["error"]["message"]
        assert "access-control-allow-origin" not in answer.headers
    assert http.post("/flush_cache").status_code == 200


def test_all_keys_are_compared_whatever_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((a, b)) or original(a, b))

    class Connection:
        headers = {"authorization": f"Bearer {API}"}  # noqa: RUF012
        client = None

    Authorizer(API, ADMIN).check(Connection(), "infer")  # type: ignore[arg-type]
    assert len(seen) == 2
    assert all(len(one) == len(other) == 32 for one, other in seen)
