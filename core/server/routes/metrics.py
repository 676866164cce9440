"""``GET /metrics``: Prometheus text, only with ``--enable-metrics``."""

from __future__ import annotations

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from trunkline.core.client.metrics import MetricsPage
from trunkline.core.server.api.media_types import PROMETHEUS, TEXT


def metrics_route(page: MetricsPage) -> HTTPRouteHandler:
    @get("/metrics", opt={"scope": "public", "replies": {200: {TEXT: str}}})
    async def show() -> Response[bytes]:
        """Metrics as Prometheus text; only with ``--enable-metrics``."""
        return Response(page.text(), headers={"content-type": PROMETHEUS})

    return show
