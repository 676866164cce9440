"""Which key may call which route. Every route declares a scope: ``public``, ``infer`` or ``admin``."""

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


class Unauthorized(RequestError):
    """No key, or not one that opens this route. ``reason`` says which of the two."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__("Unauthorized", status=401)
        hint = "missing, send it as 'Authorization: Bearer KEY'" if missing else "wrong"
        self.reason = f"the API key is {hint}"


class Doorkeeper:
    """Checks keys; without any, admits everybody to inference and only local callers to admin.

    Keys are compared as SHA-256 digests in constant time, and all of them every time, so that
    the time taken tells neither which key was close nor how close.
    """

    def __init__(self, api_key: str | None, admin_api_key: str | None) -> None:
        self._api = _digest(api_key)
        self._admin = _digest(admin_api_key)

    def check(self, connection: Connection, scope: str) -> None:
        """Raise Unauthorized (401) or RequestError 403 unless the caller may use ``scope``."""
        if scope == "public":
            return
        is_api, is_admin = self._known(connection)
        unauthorized = Unauthorized(missing="authorization" not in connection.headers)
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
        """Does the caller show the API key, the admin key?"""
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode("latin-1", "replace")).digest()
        bearer = scheme.lower() == "bearer"
        is_api = hmac.compare_digest(given, self._api or bytes(32))
        is_admin = hmac.compare_digest(given, self._admin or bytes(32))
        return bearer and is_api, bearer and is_admin


def is_local(connection: Connection) -> bool:
    """Does the request come from this machine, and not through a proxy or a web page?

    The peer must be a loopback address, the Host a local name (else a name that an attacker
    controls was pointed at us: DNS rebinding), and no browser may have sent it for another origin.
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
    # Pages may send GET requests without Origin; browsers label those.
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
