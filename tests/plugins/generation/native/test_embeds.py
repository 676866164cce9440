"""Prompts that are embeddings in a real engine, against transformers' ``inputs_embeds`` in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from trunkline.core import Engine
from trunkline.core.engine.admission import submission
from trunkline.core.errors import RequestError
from trunkline.core.model import embeds as proof
from trunkline.core.testing import ZOO
from trunkline.core.types import Launched, Part, Submission
from trunkline.plugins.generation.native import embeds as native
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams

NEW = 12  # tokens
GAP = 1e-3  # between the best two logits: closer ones may swap
LENGTHS = (5, 23, 41)
Embeds = list[np.ndarray]


@cache
def transformers_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


@cache
def prompts(path: Path) -> tuple[list[list[int]], Embeds]:
    """Prompts of token ids (one has only zeros, like those of embeddings), and embeddings that aren't in the table."""
    draw = torch.Generator().manual_seed(3)
    table = transformers_model(path).get_input_embeddings()
    with torch.inference_mode():
        rows = [table(torch.randint(4, 500, (length,), generator=draw)) for length in LENGTHS]
        mixed = [row + 0.3 * row.roll(1, 0) for row in rows]
    ids = [torch.randint(4, 500, (11,), generator=draw).tolist(), [0] * LENGTHS[1]]
    return ids, [row.numpy() for row in (*mixed, torch.cat([mixed[2][:33], mixed[0]]))]


@cache
def reference(path: Path) -> list[tuple[list[int], torch.Tensor]]:
    """transformers' greedy continuation of each prompt, ids first, and the logits of each step ``[NEW, V]``."""
    model = transformers_model(path)
    table = model.get_input_embeddings()
    ids, embeds = prompts(path)
    result = []
    with torch.inference_mode():
        for start in (*(table(torch.tensor(prompt)) for prompt in ids), *map(torch.from_numpy, embeds)):
            vectors, tokens, rows = start, [], []
            for _ in range(NEW):
                rows.append(model(inputs_embeds=vectors[None], use_cache=False).logits[0, -1])
                tokens.append(int(rows[-1].argmax()))
                vectors = torch.cat([vectors, table(torch.tensor(tokens[-1:]))])
            result.append((tokens, torch.stack(rows)))
    return result


class RecordedEngine:
    """An engine that records the logits of each request."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.engine = Engine(str(path), dtype="float32", threads=1, **options)
        (self.lane,) = self.engine.client.transport.loop.lanes
        self.logits: dict[tuple[str, int], torch.Tensor] = {}  # (rid, position of the new token)
        stage, head = self.lane.stages["generation"], self.lane.model.heads["lm"]
        launch = stage.launch
        latest: list[torch.Tensor] = []

        def watch_head(hidden: torch.Tensor) -> torch.Tensor:
            latest[:] = [head(hidden)]
            return latest[0]

        def watch_launch(part: Part, hidden: torch.Tensor) -> Launched:
            launched: Launched = launch(part, hidden)
            for row, logits in zip(part.rows, latest[0], strict=True):
                self.logits[row.request.rid, row.end] = logits.clone()
            return launched

        self.lane.model.heads["lm"] = watch_head
        stage.launch = watch_launch

    def check(self, label: str) -> list[int]:
        """Run all prompts at once and compare; returns the number of cached tokens of each."""
        ids, embeds = prompts(self.path)
        params = GenerationParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        items = [Submission(prompt=prompt, params=params, rid=f"{label}i{n}") for n, prompt in enumerate(ids)]
        items += [
            Submission(prompt=[0] * len(rows), params=params, rid=f"{label}e{n}", embeds=rows.tobytes())
            for n, rows in enumerate(embeds)
        ]
        tickets = self.engine.submit_all("generation", items)
        for item, ticket, (tokens, logits) in zip(items, tickets, reference(self.path), strict=True):
            ours = ticket.result(60).tokens
            for step in range(NEW):
                mine = self.logits[ticket.reply.rid, len(item.prompt) + step]
                assert (mine - logits[step]).abs().max() <= 1e-4, f"{ticket.reply.rid}, step {step}"
                best, second = logits[step].topk(2).values
                if best - second < GAP:
                    break
                assert ours[step] == tokens[step]
        return [ticket.reply.cached_tokens for ticket in tickets]


@pytest.fixture
def recorded_engine() -> Iterator[Callable[..., RecordedEngine]]:
    opened: list[RecordedEngine] = []

    def open_engine(path: Path, **options: Any) -> RecordedEngine:
        opened.append(RecordedEngine(path, **options))
        return opened[-1]

    yield open_engine
    for recorded in opened:
        recorded.engine.close()


@pytest.mark.parametrize("name", ZOO)
def test_embeddings_in_chunks_beside_ids_and_from_the_cache(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], name: str
) -> None:
    engine = recorded_engine(zoo(name), chunked_prefill_size=9)
    first, second = engine.check("first"), engine.check("second")
    lengths = [11, LENGTHS[1], *LENGTHS, 33 + LENGTHS[0]]
    assert first[:5] == [0] * 5, "the cached prefix of another prompt was used"
    assert second == [length - 1 for length in lengths]


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
def test_a_retraction_changes_nothing(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], backend: str
) -> None:
    options = {"chunked_prefill_size": 16, "max_total_tokens": 60, "disable_radix_cache": True}
    engine = recorded_engine(zoo("llama"), attention_backend=backend, **options)
    retracted: list[Any] = []
    plan = engine.lane.scheduler.plan

    def watch_plan(**options: Any) -> Any:
        batch = plan(**options)
        retracted.extend(() if batch is None else batch.retracted)
        return batch

    engine.lane.scheduler.plan = watch_plan
    engine.lane.scheduler.reserve.ratio = 0.0
    engine.check("tight")
    assert any(request.embeds is not None for request in retracted)


def test_a_cache_key_without_the_content_is_detected(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "content_salt", lambda content: b"")
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9)
    with pytest.raises(AssertionError, match=r"\w, step"):
        engine.check("first")


def submit(engine: RecordedEngine, **changes: Any) -> Any:
    fields: dict[str, Any] = {"prompt": [0] * 3, "embeds": np.ones((3, 128), np.float32).tobytes(), "rid": "x"}
    params = GenerationParams(max_new_tokens=2, temperature=0.0, ignore_eos=True)
    [ticket] = engine.engine.submit_all("generation", [Submission(**{"params": params} | fields | changes)])
    return ticket.result(60)


def test_invalid_embeddings_are_refused_by_the_engine(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine]
) -> None:
    engine = recorded_engine(zoo("llama"))
    narrow, odd = np.ones((3, 64), np.float32).tobytes(), b"12345678"
    for changes, message in (
        ({"embeds": narrow}, r"^input_embeds have 64 components each; embeddings of .* have 128\.$"),
        ({"embeds": odd}, "8 bytes aren't float32 embeddings of 3 tokens"),
        ({"embeds": np.full((3, 128), np.nan, np.float32).tobytes()}, "Embeddings must be finite"),
        ({"embeds": np.full((3, 128), 3.4e38, np.float32).tobytes()}, "input_embeds were not finite .*; send numbers"),
        ({"params": GenerationParams(logprobs=LogprobParams(start=0))}, "logprob_start_len"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            submit(engine, **changes)
        assert caught.value.status == 400
    assert (
        len(submit(engine, params=GenerationParams(max_new_tokens=2, ignore_eos=True, logprobs=LogprobParams())).tokens)
        == 2
    )
    assert len(submit(engine).tokens) == 2


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_that_uses_ids_elsewhere_refuses_embeddings_and_serves_ids(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], raises: bool
) -> None:
    engine = recorded_engine(zoo("qwen2"))
    backbone = engine.lane.model.backbone
    forward, table = backbone.forward, torch.nn.Embedding(512, 128)

    def with_more(input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        if input_ids is None and raises:
            raise TypeError("per-layer embeddings need ids")
        output = forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **others)
        if input_ids is not None and not getattr(output, "picked", False):
            output.last_hidden_state = output.last_hidden_state + table(input_ids)
        return output

    backbone.forward = with_more
    why = "raised TypeError: per-layer embeddings need ids" if raises else "uses token ids elsewhere, too"
    for _ in range(2):
        with pytest.raises(RequestError, match=rf"can't take input_embeds: .*{why}"):
            submit(engine)
    assert len(submit(engine, embeds=b"", prompt=[5, 6]).tokens) == 2


def test_the_verification_runs_once(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., RecordedEngine], monkeypatch: Any
) -> None:
    engine, runs, prove = recorded_engine(zoo("llama")), [], proof._difference
    monkeypatch.setattr(proof, "_difference", lambda model: runs.append(model) or prove(model))
    for _ in range(3):
        submit(engine)
    assert len(runs) == 1
    submit(engine, embeds=b"")


# -- over HTTP -------------------------------------------------------------------------------


async def test_a_single_prompt_and_a_batch(client: httpx.AsyncClient, engine: Any) -> None:
    engine.script = lambda item: [5, {"type": "length", "length": 1}]
    one = {"input_embeds": [[0.5, 1], [2, 3.5]], "return_prompt_token_ids": True}
    record = (await client.post("/generate", json=one)).json()
    assert (record["meta_info"]["prompt_tokens"], record["prompt_token_ids"]) == (2, [])
    assert engine.items[0].prompt == [0, 0]
    assert np.frombuffer(engine.items[0].embeds, np.float32).tolist() == [0.5, 1, 2, 3.5]
    records = (await client.post("/generate", json={"input_embeds": [[[1.0, 2]], [[3, 4], [5, 6]]]})).json()
    assert [record["meta_info"]["prompt_tokens"] for record in records] == [1, 2]
    assert len((await client.post("/generate", json={"input_embeds": [[[1.0, 2]]]})).json()) == 1
    assert (await client.post("/generate", json={"text": "a", "input_embeds": [[1.0]]})).status_code == 200
    assert engine.items[-1].embeds == b"", "text or ids count"


async def test_samples_and_their_prefill_have_the_embeddings(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"input_embeds": [[0.5], [1]], "sampling_params": {"n": 2}}
    assert len((await client.post("/generate", json=body)).json()) == 2
    assert [len(item.embeds) for item in engine.items] == [8, 8, 8]


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        ([], "input_embeds cannot be empty."),
        ([[]], "input_embeds[0]: a prompt's list of vectors cannot be empty."),
        ([[[1.0]], []], "input_embeds[1]: a prompt's list of vectors cannot be empty."),
        ([[[1.0]], [[1.0], [1, 2]]], "input_embeds[1]: all vectors of a prompt must have the same number of"),
        ([[1.0], [1, 2]], "all vectors of a prompt must have the same number of components, got [1, 2]."),
        ([[[]]], "input_embeds[0]: all vectors of a prompt must have the same number of components, got [0]."),
        ([[[1.0]], [2.0]], "input_embeds[1]: numbers and lists of numbers are mixed"),
        ([[1.0], [[2.0]]], "vectors are nested too deeply"),
        ([[0.5]] * 100, "The input (100 tokens) is longer than the model's context length (100 tokens)."),
    ],
)
async def test_invalid_shapes(client: httpx.AsyncClient, engine: Any, embeds: Any, message: str) -> None:
    answer = await client.post("/generate", json={"input_embeds": embeds})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert engine.items == []


@pytest.mark.parametrize("embeds", [[[1e300]], [["nan"]], [["inf"]], [[None]], [["a"]], [[[[1.0]]]], 5, [1.0]])
async def test_values_that_are_no_embeddings(client: httpx.AsyncClient, embeds: Any) -> None:
    answer = await client.post("/generate", json={"input_embeds": embeds})
    assert (answer.status_code, answer.json()["type"]) == (400, "Bad Request")


async def test_all_three_inputs_at_once_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"text": "a", "input_ids": [1], "input_embeds": [[1.0]]})
    assert answer.json()["error"]["message"] == "Either text, input_ids or input_embeds should be provided."


async def test_the_size_of_all_samples_is_limited(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MAX_BYTES", 15)
    body = {"input_embeds": [[0.5], [1]], "sampling_params": {"n": 2}}
    answer = await client.post("/generate", json=body)
    assert answer.json()["error"]["message"].startswith("input_embeds of all 2 sequences have 16 bytes as float32;")
