"""Checks API keys. Every route declares a scope, ``public``, ``infer`` or ``admin``, which says who may call it."""

from __future__ import annotations

import hmac
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection

from trunkline.core.errors import RequestError

SCOPES = ("public", "infer", "admin")
FORWARDING = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")

Connection = ASGIConnection[Any, Any, Any, Any]


class InvalidKey(RequestError):
    """The key is missing or wrong for this route. ``reason`` says which."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__("Unauthorized", status=401)
        hint = "missing, send it as 'Authorization: Bearer KEY'" if missing else "wrong"
        self.reason = f"the API key is {hint}"


class Authorizer:
    """Checks API keys. If none is configured, inference is open to all clients, and admin routes to local ones.

    Keys are compared as SHA-256 digests in constant time, and each request with all keys, so that the time taken
    reveals nothing about them.
    """

    def __init__(self, api_key: str | None, admin_api_key: str | None) -> None:
        self._api = _digest(api_key)
        self._admin = _digest(admin_api_key)

    def check(self, connection: Connection, scope: str) -> None:
        """Raise InvalidKey (401) or RequestError 403 unless the caller may use ``scope``."""
        if scope == "public":
            return
        is_api, is_admin = self._known(connection)
        unauthorized = InvalidKey(missing="authorization" not in connection.headers)
        if scope == "infer":
            if self._api is not None and not (is_api or is_admin):
                raise unauthorized
            return
        if self._admin is not None:
            if not is_admin:
                raise unauthorized
        elif self._api is not None:
            if not is_api:
                raise unauthorized
        elif not is_local(connection):
            raise RequestError(
                "Administrative routes are open to local callers only, because no key is set: "
                "start the server with --admin-api-key and send it as 'Authorization: Bearer KEY'.",
                status=403,
            )

    def _known(self, connection: Connection) -> tuple[bool, bool]:
        """Whether the request has the API key, and whether it has the admin key."""
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode("latin-1", "replace")).digest()
        bearer = scheme.lower() == "bearer"
        is_api = hmac.compare_digest(given, self._api or bytes(32))
        is_admin = hmac.compare_digest(given, self._admin or bytes(32))
        return bearer and is_api, bearer and is_admin


def is_local(connection: Connection) -> bool:
    """Whether the request comes from this machine, neither through a proxy nor from a web page of another origin.

    The peer must be a loopback address and the Host header a local name. (With DNS rebinding, an attacker's host name
    resolves to the loopback address.)
    """
    headers = connection.headers
    client = connection.client
    if client is None or not _is_loopback(client.host):
        return False
    if any(header in headers for header in FORWARDING):
        return False
    if not _is_loopback(_hostname("//" + headers.get("host", ""))):
        return False
    origin = headers.get("origin")
    if origin is not None and not _is_loopback(_hostname(origin)):
        return False
    # Web pages can send GET requests without Origin; browsers mark them with Sec-Fetch-Site.
    return headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _digest(key: str | None) -> bytes | None:
    return sha256(key.encode()).digest() if key else None


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
