"""Small tokenizers, an engine with scripted replies, an app with the plugin's routes, and a recorded real engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
import torch
import uvicorn
from litestar import Litestar, Request
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trunkline.core import Engine
from trunkline.core import types as core_types
from trunkline.core.engine.scheduling.batch import Batch
from trunkline.core.errors import RequestError
from trunkline.core.server.api import encode_json
from trunkline.core.server.api.bodies import dialect_of, error_response
from trunkline.core.types import ModelInfo, ServedModel, Submission
from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.native.make_job import make_job
from trunkline.plugins.generation.native.routes import frames, generate_routes
from trunkline.plugins.generation.openai.chat_routes import chat_routes
from trunkline.plugins.generation.openai.completion_routes import completion_routes
from trunkline.plugins.generation.responses.routes import responses_routes
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable
from trunkline.plugins.generation.service import Service
from trunkline.plugins.generation.settings import GenerationSettings

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'refused' %}{{ raise_exception('no such role here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "中文 字符 émoji 🙂🙃 naïve"] * 5


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like GPT-2's: every byte is a token, and a character may consist of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """A metaspace tokenizer like Llama 2's: words begin with their space, which decoding strips from the first one.

    Rare characters are byte tokens.
    """
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz,",
        "▁hello",
        "▁world",
    ]
    merges = [("▁", "h"), ("e", "l")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer)


def fake_logprobs(tokens: Sequence[int], params: LogprobParams) -> dict[str, bytes]:
    """Fields of a LogprobTable: token t has -t / 64; the most likely ids are 1, 2, …, after t itself if it is even."""
    ranked = [[token, *range(1, params.top)] if token % 2 == 0 else list(range(1, params.top + 1)) for token in tokens]
    top_ids = np.array([row[: params.top] for row in ranked], "<i4").reshape(len(tokens), params.top)
    return {
        "chosen": np.array([-token / 64 for token in tokens], "<f4").tobytes(),
        "top_ids": top_ids.tobytes(),
        "top": (-top_ids / 64).astype("<f4").tobytes(),
    }


def fake_results(item: Submission, token: int, *, first: bool) -> list[Any]:
    """The results of a step, as a reply has them: log-probabilities of the prompt, if ``first``, and of a token."""
    params = item.params.logprobs
    if params is None:
        return []
    prompt = None
    if first and params.start is not None and params.prompt_known is None:
        prompt = LogprobTable(**fake_logprobs(item.prompt[params.start + 1 :], params))
    output = LogprobTable(**fake_logprobs([token], params), chosen_ids=np.int32(token).tobytes())
    result = GenerationResult(output=output, prompt=prompt, first=(params.start or 0) + 1)
    return [msgspec.to_builtins(result, builtin_types=(bytes,))]


class FakeReply:
    """A reply whose tokens are added by the test or by the script of :class:`FakeEngine`."""

    def __init__(self, item: Submission, *, with_results: bool = False) -> None:
        self.item = item
        self.with_results = with_results
        self.rid = item.rid
        self.prompt_tokens = len(item.prompt)
        self.cached_tokens = 0
        self.weight_version = ""
        self.versions: list[tuple[str, int]] = []
        self.tokens: list[int] = []
        self.results: list[Any] = []
        self.finish: dict[str, Any] | None = None
        self.error: RequestError | None = None
        self.created = time.perf_counter()
        self.finished = 0.0
        self.cancelled = False
        self._updated = asyncio.Event()
        self._ended = asyncio.Event()

    def add(self, *tokens: int, finish: dict[str, Any] | None = None, error: RequestError | None = None) -> None:
        if self._ended.is_set():
            return
        if self.with_results:
            # Without output tokens, the next token's log-probability is returned.
            for token in tokens or [3] * bool(finish and not self.tokens):
                self.results += fake_results(self.item, token, first=not self.results)
        self.tokens += tokens
        self.finish, self.error = finish, error
        self._updated.set()
        if finish or error:
            self.finished = time.perf_counter()
            self._ended.set()

    async def wait(self) -> None:
        if not self._ended.is_set():
            await self._updated.wait()
        self._updated.clear()

    async def begun(self) -> None:
        await self._updated.wait()

    async def result(self) -> None:
        await self._ended.wait()
        if self.error:
            raise self.error

    def cancel(self) -> None:
        if not self._ended.is_set():
            self.cancelled = True
            self.add(finish={"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})


Script = Callable[[Submission], Sequence[int | dict[str, Any] | RequestError]]


class FakeEngine:
    """Replies to each submission with ``script(item)``: tokens one by one, then a finish reason or an error."""

    def __init__(self, tokenizer: Any, **served: Any) -> None:
        info = ModelInfo(
            path=served.pop("path", "/nowhere"),
            architecture="LlamaForCausalLM",
            model_type="llama",
            context_length=served.pop("context_length", 100),
            vocab_size=len(tokenizer) if tokenizer else 1000,
            hidden_size=8,
            causal=True,
        )
        name = served.pop("name", "fake")
        self.models = [
            ServedModel(
                name=name,
                model_path=name,
                tokenizer_path=name,
                info=info,
                tasks={"generation": True},
                max_total_tokens=served.pop("max_total_tokens", 1000),
                max_running_requests=8,
                dtype="float32",
                attention_backend="cpu",
            )
        ]
        self._tokenizer = tokenizer
        self.generation_settings = GenerationSettings()
        self.script: Script = lambda item: [{"type": "length", "length": 0}]
        self.items: list[Submission] = []
        self.replies: list[FakeReply] = []
        self.refuse: RequestError | None = None
        self.with_results = False  # replies have the results of fake_results
        self.with_threads = True  # off the event loop; while a thread runs, many tokens may come
        self._tasks: set[asyncio.Task[None]] = set()

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        return self.models[0]

    def settings(self, model: str) -> dict[str, Any]:
        return {"generation": self.generation_settings}

    def tokenizer(self, model: str) -> Any:
        return self._tokenizer

    async def tokenize(
        self, model: str, texts: Sequence[str], *, special: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=special) for text in texts]

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        return await asyncio.to_thread(function, *args) if self.with_threads else function(*args)

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[FakeReply]:
        if self.refuse is not None:
            raise self.refuse
        replies = [FakeReply(item, with_results=self.with_results) for item in items]
        self.items += items
        self.replies += replies
        for reply in replies:
            task_ = asyncio.create_task(self._play(reply))
            self._tasks.add(task_)
            task_.add_done_callback(self._tasks.discard)
        return replies

    async def _play(self, reply: FakeReply) -> None:
        if reply.item.params.max_new_tokens == 0:
            reply.add(finish={"type": "length", "length": 0})
        events = list(self.script(reply.item))
        while events:
            for _ in range(8):  # so that readers see every step
                await asyncio.sleep(0)
            event = events.pop(0)
            tokens = [event] if isinstance(event, int) else []
            if tokens and events and isinstance(events[0], dict):  # the last token and the finish reason come together
                event = events.pop(0)
            if isinstance(event, RequestError):
                reply.add(error=event)
            elif isinstance(event, dict):
                reply.add(*tokens, finish=event)
            else:
                reply.add(event)

    def says(self, text: str, finish: dict[str, Any] | None = None) -> None:
        """Reply to all further requests with the tokens of ``text``."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        self.script = lambda item: [*ids, finish or {"type": "length", "length": len(ids)}]


@pytest.fixture
def make_engine(byte_level: PreTrainedTokenizerFast) -> Callable[..., FakeEngine]:
    return lambda tokenizer=byte_level, **served: FakeEngine(tokenizer, **served)


@pytest.fixture
def engine(make_engine: Callable[..., FakeEngine]) -> FakeEngine:
    return make_engine()


@pytest.fixture
def make_settings() -> Callable[..., dict[str, Any]]:
    def make() -> dict[str, Any]:
        return {
            "server": SimpleNamespace(max_batch_size=16, stream_timeout=5.0),
            "engine": SimpleNamespace(random_seed=1),
        }

    return make


@pytest.fixture
def make_app(make_settings: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Makes an app with the plugin's routes, which renders errors as the server does."""

    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error, dialect_of(request))

    def make(engine: Any, **generation: Any) -> Litestar:
        if generation:
            engine.generation_settings = GenerationSettings(**generation)
        service = Service(engine, make_settings())
        others = [*completion_routes(service), *chat_routes(service), *responses_routes(service)]
        return Litestar([*generate_routes(service), *others], exception_handlers={RequestError: refuse})

    return make


@pytest.fixture
async def client(engine: FakeEngine, make_app: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as client:
        yield client


@pytest.fixture
async def sdk(engine: FakeEngine, make_app: Callable[..., Any]) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of a server on a real port."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    await serving


# -- the whole engine --------------------------------------------------------------------------


class RecordedEngine:
    """A real engine to which bodies of ``/generate`` are sent; it records the batches of its scheduler."""

    def __init__(self, path: Path, **options: Any) -> None:
        options = {"dtype": "float32", "threads": 1, "enable_return_hidden_states": True} | options
        self.path = path
        self.engine = Engine(str(path), **options)
        (self.lane,) = self.engine.client.transport.loop.lanes
        self.batches: list[Batch] = []
        self.retracted: list[core_types.Request] = []
        # Whether a running request is retracted before the next pass.
        self.must_retract: Callable[[core_types.Request], bool] = lambda request: False
        self._chosen: list[Any] = []  # will be retracted when no batch is in flight
        self._plan = self.lane.scheduler.plan
        self.lane.scheduler.plan = self._record

    def _record(self, *, ahead: bool = False, **options: Any) -> Batch | None:
        scheduler = self.lane.scheduler
        chosen = [each for each in scheduler._running if each in self._chosen or self.must_retract(each.request)]
        self._chosen = chosen if ahead else []
        if chosen and ahead:
            return None  # first the batch in flight is collected
        for entry in chosen:
            scheduler._requeue(entry)
        batch: Batch | None = self._plan(ahead=ahead, **options)
        if batch is not None:
            batch.retracted.extend(entry.request for entry in chosen)
            self.batches.append(batch)
            self.retracted += batch.retracted
        return batch

    def watch_head(self) -> list[int]:
        """A list to which each later call of the head appends its number of rows."""
        rows: list[int] = []
        head = self.lane.model.heads["lm"]

        def watched(hidden: torch.Tensor) -> torch.Tensor:
            rows.append(len(hidden))
            out: torch.Tensor = head(hidden)
            return out

        self.lane.model.heads["lm"] = watched
        return rows

    def __call__(self, **body: Any) -> list[dict[str, Any]]:
        """The records of one body."""
        return self.together([body])[0]

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The frames of one body, as a stream."""
        return self.together([body | {"stream": True}])[0]

    def together(self, bodies: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The records (frames, of streams) of several bodies that are sent at the same time."""

        async def run(service: Service) -> list[list[dict[str, Any]]]:
            return list(await asyncio.gather(*(self._answer(service, body) for body in bodies)))

        return self.engine.run(run(self.engine.service(Service)), 120)

    async def _answer(self, service: Service, body: dict[str, Any]) -> list[dict[str, Any]]:
        job = await make_job(service, msgspec.convert(body, GenerateBody))
        if not body.get("stream"):
            records: list[dict[str, Any]] = json.loads(
                encode_json([sequence.record() for sequence in await service.complete(job)])
            )
            return records
        sequences = await service.submit(job)
        intervals = [params.stream_interval or 1 for params in job.sampling for _ in range(job.n)]
        events = [event async for event in frames(service, sequences, intervals, single=job.one_sequence)]
        assert events[-1] == b"data: [DONE]\n\n"
        return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]

    def flush(self) -> None:
        assert self.engine.run(_call(self.engine, "flush_cache"))


async def _call(engine: Engine, control: str) -> Any:
    return await engine.client.call(control)


@pytest.fixture
def recorded_engine() -> Iterator[Callable[..., RecordedEngine]]:
    opened: list[RecordedEngine] = []

    def open_engine(*args: Any, **options: Any) -> RecordedEngine:
        opened.append(RecordedEngine(*args, **options))
        return opened[-1]

    yield open_engine
    for recorded in opened:
        recorded.engine.close()
