"""sentence-transformers folders that the library itself writes, and the routes over an engine in this process."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from litestar import Litestar, Request

from trunkline.core import Engine
from trunkline.core.client.engine import Ticket
from trunkline.core.client.models import choose_model
from trunkline.core.errors import ModelError, RequestError
from trunkline.core.server.api.bodies import dialect_of, error_response
from trunkline.core.types import ServedModel, Submission
from trunkline.plugins.embedding.cohere_routes import cohere_routes
from trunkline.plugins.embedding.openai_routes import openai_routes
from trunkline.plugins.embedding.routes import encode_routes
from trunkline.plugins.embedding.service import Service
from trunkline.plugins.embedding.settings import EmbeddingSettings
from trunkline.plugins.embedding.tei_routes import tei_routes

TEXTS = [
    "A",
    "The quick brown fox jumps over the lazy dog.",
    "hello there",
    "it is the tale of an old sailor who sold his ship and then had a house on the shore " * 3,
    "The quick brown fox jumps over the lazy cat.",
]


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The smallest cosine between rows of the same index."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(((ours * theirs).sum(axis=1) / norms).min())


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def least_cosine() -> Callable[[np.ndarray, np.ndarray], float]:
    return cosine


@pytest.fixture(scope="session")
def plain(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the zoo without chat template, which sentence-transformers would put texts through."""
    root = tmp_path_factory.mktemp("plain")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            shutil.copytree(zoo(name), folder)
            settings = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
            lines = [line for line in settings.splitlines() if '"chat_template"' not in line]
            (folder / "tokenizer_config.json").write_text("\n".join(lines), encoding="utf-8")
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def saved(plain: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """``saved(name, modes, *more, **options)``: a folder and the SentenceTransformer that wrote it.

    ``more`` are functions from the width so far to a module. The library's own seed-free weights are
    replaced by noise, so that a module left out shows.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    made: dict[str, tuple[Path, Any]] = {}

    def make(
        name: str, modes: tuple[str, ...], *more: Callable[[int], Any], include_prompt: bool = True, **options: Any
    ) -> tuple[Path, Any]:
        key = repr((name, modes, [getattr(each, "__name__", each) for each in more], include_prompt, options))
        if key not in made:
            transformer = Transformer(str(plain(name)), **options.pop("transformer", {}))
            width = transformer.get_embedding_dimension()
            modules = [transformer, Pooling(width, modes, include_prompt=include_prompt)]
            width *= len(modes)
            for each in more:
                modules.append(each(width))
                width = getattr(modules[-1], "get_embedding_dimension", lambda width=width: width)()
            generator = torch.Generator().manual_seed(len(made))
            for module in modules[2:]:
                for parameter in module.parameters():
                    parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            model = SentenceTransformer(modules=modules, device="cpu", **options)
            folder = tmp_path_factory.mktemp("saved") / name
            model.save(str(folder), create_model_card=False)
            made[key] = folder, model
        return made[key]

    return make


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """``engine(folder, **options)``: in float32, closed after the test."""
    opened: list[Engine] = []

    def make(folder: Path, **options: Any) -> Engine:
        opened.append(Engine(str(folder), **{"dtype": "float32", "threads": 1, **options}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, if it has been fetched (``make fetch``)."""
    from trunkline.core.model.sources import catalogue

    try:
        return catalogue.fetch("demo:all-minilm-l6-v2")
    except ModelError as error:
        pytest.skip(f"demo:all-minilm-l6-v2 isn't here: {error}")


class Pending:
    """A ticket as routes see it."""

    def __init__(self, ticket: Ticket, item: Submission) -> None:
        self._ticket = ticket
        self.prompt_tokens = len(item.prompt)
        self.weight_version = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket.reply, name)

    def cancel(self) -> None:
        self._ticket.cancel()

    async def result(self) -> None:
        await asyncio.to_thread(self._ticket.result, 60)


class InProcess:
    """An Engine as an EngineClient. ``submitted`` counts what reached it."""

    def __init__(self, *engines: Engine, own: EmbeddingSettings) -> None:
        self._own = own
        self._by_name = {served.name: engine for engine in engines for served in engine.models}
        self.models = [served for engine in engines for served in engine.models]
        self.submitted = 0

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        return choose_model(self.models, task, name)

    def settings(self, model: str) -> dict[str, Any]:
        return {"embedding": self._own}

    def tokenizer(self, model: str) -> Any:
        return self._by_name[model].tokenizer(model)

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return await asyncio.to_thread(function, *args)

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Pending]:
        self.submitted += len(items)
        engine = self._by_name[model]
        return [
            Pending(engine.submit(task, item.prompt, item.params, model=model, rid=item.rid, salt=item.salt), item)
            for item in items
        ]


@pytest.fixture
def serve() -> Callable[..., Any]:
    """``async with serve(engine, …, **settings) as (http, client)``: the plugin's routes and the engine client."""

    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error, dialect_of(request))

    @asynccontextmanager
    async def run(*engines: Engine, **given: Any) -> AsyncIterator[tuple[httpx.AsyncClient, InProcess]]:
        client: Any = InProcess(*engines, own=EmbeddingSettings(**given))
        server = SimpleNamespace(max_batch_size=8, max_queued_requests=99, stream_timeout=5.0)
        service = Service(client, {"server": server})
        handlers = [
            *encode_routes(service), *openai_routes(service), *cohere_routes(service), *tei_routes(service)
        ]  # fmt: skip
        app = Litestar(handlers, exception_handlers={RequestError: refuse})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            yield http, client

    return run
