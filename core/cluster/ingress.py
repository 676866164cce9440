"""``Ingress``: the front as an ASGI application, which starts and stops by the messages of ASGI's lifespan."""

from __future__ import annotations

import logging
from typing import Any

from trunkline.core.client.client import Client
from trunkline.core.client.transport import Connect
from trunkline.core.config import Config
from trunkline.core.errors import describe_error
from trunkline.core.host import Host
from trunkline.core.server.front import Engine, application, prepare, probe_model

log = logging.getLogger("trunkline.cluster")


class Ingress:
    """All routes over the engine that ``connect`` gives, for an HTTP server that isn't ours."""

    def __init__(self, host: Host, config: Config, connect: Connect) -> None:
        self._host, self._config, self._connect = host, config, connect
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()  # lifespan.startup
        engine: Engine = Client(self._config, self._host, self._connect)
        try:
            await engine.start(prepare)
            app, lifecycle = application(self._host, self._config, engine)
            async with app.lifespan():
                self._app = app
                if not self._config.server.skip_server_warmup:
                    for model in engine.models:
                        await probe_model(engine, model.name)
                lifecycle.warm = True
                await send({"type": "lifespan.startup.complete"})
                await receive()  # lifespan.shutdown: the HTTP server has drained
                lifecycle.draining = True
        except Exception as error:
            log.exception("the ingress failed")
            await send({"type": "lifespan.startup.failed", "message": describe_error(error)})
            return
        finally:
            await engine.stop()
        await send({"type": "lifespan.shutdown.complete"})
