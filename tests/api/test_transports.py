"""One client, two transports: an engine process and an engine in this process answer every task alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from inspect import get_annotations
from pathlib import Path
from typing import Any

import pytest

from trunkline.core.client.client import Client
from trunkline.core.client.engine import Engine
from trunkline.core.client.supervisor import supervised
from trunkline.core.errors import RequestError
from trunkline.core.server.api import DONE, inputs_from_python
from trunkline.core.types import EngineClient, Reply, Submission
from trunkline.plugins.embedding import service as embedding
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.generation import service as generation
from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.native.make_job import make_job
from trunkline.plugins.generation.native.routes import frames
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.moe_stats import service as moe_stats
from trunkline.plugins.moe_stats.settings import LOOK, START, STOP
from trunkline.plugins.rerank import service as reranking
from trunkline.plugins.rerank.offline import rerank
from trunkline.plugins.rerank.reranker import Limits
from trunkline.plugins.reward import service as reward
from trunkline.plugins.reward.offline import classify

MODELS = ("mixtral", "bert", "bert-score", "qwen2-labels")
SETTINGS = {
    "random_seed": 7,
    "matryoshka": True,
    "embedding_truncate": "end",
    "preferred_sampling_params": '{"top_k": 20}',
    "max_n": 3,
}
LONG = "the sea and the other there " * 300
DIFFERENT = {"rid", "created", "started", "first", "latest", "finished"}  # ids, some of them random, and times
FIELDS = sorted({*get_annotations(Reply)} - DIFFERENT)


class Recorder:
    """An engine client that keeps the replies of all that is submitted."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.replies: list[Reply] = []

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
        replies = self.engine.submit(model, task, items)
        self.replies += replies
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


async def refusal(work: Any) -> tuple[int, str, str | None]:
    """Status, message and field of the error that ``work`` ends with."""
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value.status, caught.value.message, caught.value.param


def without_times(meta_info: Any) -> dict[str, Any]:
    """``meta_info`` without its latency, and without its id, which is random if there are several samples."""
    return {name: value for name, value in meta_info.items() if name not in ("id", "e2e_latency")}


def fields_of(reply: Reply) -> dict[str, Any]:
    """All fields of a reply that don't differ by chance; ``weights_id`` in results is random in each engine."""
    fields = {field: getattr(reply, field) for field in FIELDS}
    for result in reply.results:
        if isinstance(result, dict):
            result.pop("weights_id", None)
    return fields


async def ask(engine: EngineClient, settings: Any) -> dict[str, Any]:
    """Requests of every task, one after another, so that what is cached and which rows share a pass is no race."""
    client: Any = Recorder(engine)
    talk = generation.Service(client, settings)
    embed = embedding.Service(client, settings)
    ranks = reranking.Service(client, settings)
    score = reward.Service(client, settings)
    experts = moe_stats.Service(client)
    answers: dict[str, Any] = {}

    async def generate(name: str, **body: Any) -> None:
        job = await make_job(talk, GenerateBody(rid=f"{name}-id", **body))
        sequences = await talk.complete(job)
        records = [sequence.record() for sequence in sequences]
        answers[name] = [{**record, "meta_info": None} for record in records]
        answers[f"{name}: meta_info"] = [without_times(record["meta_info"]) for record in records]

    async def stream(name: str, **body: Any) -> None:
        job = await make_job(talk, GenerateBody(rid=f"{name}-id", stream=True, **body))
        sequences = await talk.submit(job)
        try:
            events = [event async for event in frames(talk, sequences, [1], single=True)]
        finally:
            talk.close(sequences)
        assert events.pop() == DONE
        records = [json.loads(event.removeprefix(b"data: ")) for event in events]
        last = records[-1]
        assert all(last["text"].startswith(record["text"]) for record in records)
        answers[name] = {**last, "meta_info": without_times(last["meta_info"])}

    talks, _, ranker, labels = (model.name for model in client.models)
    await experts.run(START, talks)
    await generate("greedy", text="the sea and", sampling_params={"temperature": 0, "max_new_tokens": 6})
    await generate("cached", text="the sea and", sampling_params={"temperature": 0, "max_new_tokens": 6})
    await generate("drawn", text="there is", sampling_params={"max_new_tokens": 8})  # the engine's random_seed
    await generate("samples", input_ids=[5, 6, 7], sampling_params={"n": 2, "max_new_tokens": 5})
    await generate("logprobs", text="there is", return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    await stream("stream", text="the sea and", sampling_params={"temperature": 0, "max_new_tokens": 6})
    answers["experts"] = await experts.run(LOOK, talks)
    await experts.run(STOP, talks)
    too_many = GenerateBody(text="a", sampling_params={"n": 4})
    answers["max_n"] = await refusal(make_job(talk, too_many))
    answers["vocabulary"] = await refusal(make_job(talk, GenerateBody(input_ids=[10**6])))
    for wish in (
        embedding.EmbeddingRequest(inputs=inputs_from_python(["the sea"]), rid=["e-0"]),
        embedding.EmbeddingRequest(inputs=inputs_from_python([LONG]), rid=["e-1"]),  # cut, as the engine's settings say
        embedding.EmbeddingRequest(inputs=inputs_from_python(["the sea"]), rid=["e-2"], dimensions=16),  # --matryoshka
    ):
        embedded = await embed.embed(wish)
        answers[f"vector {embedded.replies[0].rid}"] = [vector.tolist() for vector in embedded.vectors()]
    reranker = ranks.reranker(ranker)
    job = reranking.ScoringRequest(queries=["sea"], documents=["the sea"], limits=Limits.of(reranker.served, None))
    answers["rerank"] = [(one.logit, one.score) for one in await ranks.score(reranker, job, "r")]
    scored = await score.score(inputs_from_python(["the sea"]), model=labels, rid=["s"])
    answers["reward"] = [scores.tolist() for scores in scored.scores()]
    answers["call"] = await client.call("flush_cache", model=talks)
    answers["replies"] = [fields_of(reply) for reply in client.replies]
    return answers


def offline_answers(engine: Engine) -> dict[str, Any]:
    """Some of the same requests through the functions for Python, with the answers in the form of :func:`ask`."""
    talks, embeds, ranks, labels = (model.name for model in engine.client.models)
    answers: dict[str, Any] = {}
    [record] = generate(engine, ["the sea and"], model=talks, temperature=0, max_new_tokens=6)
    answers["greedy"] = [{**record, "meta_info": None}]
    with pytest.raises(RequestError) as caught:
        generate(engine, ["a"], model=talks, n=4)
    answers["max_n"] = (caught.value.status, caught.value.message, caught.value.param)
    for name, text, dimensions in (("e-0", "the sea", None), ("e-1", LONG, None), ("e-2", "the sea", 16)):
        answers[f"vector {name}"] = encode(engine, [text], model=embeds, dimensions=dimensions).tolist()
    [ranked] = rerank(engine, "sea", ["the sea"], model=ranks)
    answers["rerank"] = [(ranked["logit"], ranked["score"])]
    answers["reward"] = [record["scores"] for record in classify(engine, ["the sea"], model=labels)]
    return answers


@pytest.fixture
def local(zoo: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(*(str(zoo(name)) for name in MODELS), dtype="float32", threads=1, **SETTINGS) as engine:
        yield engine


async def test_both_transports_answer_alike(local: Engine) -> None:
    ours = local.run(ask(local.client, local.config.settings))
    offline = offline_answers(local)
    remote = Client(local.config, local.host, supervised(local.config))
    await remote.start()
    try:
        theirs = await ask(remote, local.config.settings)
    finally:
        await remote.stop()
    assert ours.keys() == theirs.keys()
    for name, answer in ours.items():
        assert answer == theirs[name], name
    assert offline == {name: theirs[name] for name in offline}
    assert len(ours["replies"]) > 8
    assert ours["replies"][1]["cached_tokens"] > 0
    assert {"results", "versions", "model", "model_label"} <= ours["replies"][0].keys()
    assert ours["stream"]["text"] == ours["greedy"][0]["text"]
    assert ours["max_n"][0] == 400
    assert len(ours["vector e-2"][0]) == 16
