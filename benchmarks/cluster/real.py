"""Real replicas of a fake model, without Ray: a front, relays and engine processes; and the replay of traffic there."""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from cluster.events import Served
from cluster.setting import Setting, replica_names
from cluster.traffic import VOCABULARY, Ids, Job, Session
from trunkline.core.client.client import Client
from trunkline.core.client.supervisor import supervised
from trunkline.core.cluster import replicas as cluster_replicas
from trunkline.core.cluster.handle import Attachment
from trunkline.core.cluster.replica.relay import Relay
from trunkline.core.cluster.routing import PrefixRouting, Prompt, Sent
from trunkline.core.cluster.transport import ReplicaTransport
from trunkline.core.config import Config
from trunkline.core.host import Host
from trunkline.core.types import Reply, Submission
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.settings import TASK

ENGINE = Path(__file__).resolve().parent.parent / "fake_model_engine.py"
MODEL = "fake"
PROBES, PROBE_TOKENS = 21, 64


class LocalHandle:
    """Implements :class:`trunkline.core.cluster.handle.Handle` over relays in this process."""

    def __init__(self, relays: dict[str, Relay]) -> None:
        self._relays = relays

    def watch(self, changed: Callable[[Sequence[str]], None]) -> None:
        changed(list(self._relays))

    @asynccontextmanager
    async def attach(self, replica: str) -> AsyncIterator[Attachment]:
        async with aclosing(self._relays[replica].attach()) as call:
            yield Attachment(await anext(call), asyncio.get_running_loop().create_future())


class LeastLoadedRouting(PrefixRouting):
    """The fewest prompt tokens of requests that wait or run, as :class:`.policies.LeastLoaded`."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: Counter[str] = Counter()

    def choose(self, prompt: Prompt) -> list[str]:
        return sorted(super().choose(prompt), key=lambda name: (self._tokens[name], name))

    def sent(self, replica: str, prompt: Prompt) -> Sent:
        self._tokens[replica] += prompt.tokens
        return super().sent(replica, prompt)

    def ended(self, sent: Sent, output: bytes = b"") -> None:
        self._tokens[sent.replica.name] -= sent.prompt.tokens
        super().ended(sent, output)


class Replicas:
    """Replicas that are up, and the client of their front."""

    def __init__(self, client: Client[ReplicaTransport], setting: Setting, scale: int) -> None:
        self._client, self._setting, self._scale = client, setting, scale
        self._sent = 0

    async def overhead(self) -> float:
        """Seconds that a request for one token takes longer than its pass, on idle replicas; the median."""
        found = []
        for seed in range(PROBES):
            prompt = np.random.default_rng(seed).integers(1, VOCABULARY, PROBE_TOKENS, dtype=np.int32)
            reply = self._submit(prompt, 1, cacheable=False)
            await reply.result()
            found.append(reply.first - reply.created)
        cost = self._setting.cost
        return statistics.median(found) - (cost.fixed + cost.per_token * PROBE_TOKENS) / self._scale

    async def replay(self, sessions: Sequence[Session]) -> Served:
        """Send the requests of the sessions at their times, and return when all have ended."""
        self._began = time.perf_counter()
        replies: list[Reply] = []
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                for jobs in [session.jobs] if session.turns else [[job] for job in session.jobs]:
                    group.create_task(self._run(session.at, jobs, replies))
        counted = [reply for reply in replies if reply.created - self._began >= self._setting.start]
        seconds = self._setting.seconds - self._setting.start
        return Served(
            cached=sum(reply.cached_tokens for reply in counted) / sum(reply.prompt_tokens for reply in counted),
            waits=np.array([reply.started - reply.created for reply in counted]),
            firsts=np.array([reply.first - reply.created for reply in counted]),
            rate=len(counted) / seconds,
            output_rate=sum(len(reply.tokens) for reply in counted) / seconds,
        )

    async def _run(self, at: float, jobs: Sequence[Job], replies: list[Reply]) -> None:
        """One request after another. Each has the answers that were given before it, as a client would send them."""
        prompt, known = np.empty(0, np.int32), 0  # ``known``: tokens of the next prompt that are in ``prompt``
        for job in jobs:
            at += job.after
            await asyncio.sleep(self._began + at - time.perf_counter())
            if at >= self._setting.seconds:
                return
            prompt = np.concatenate([prompt, job.prompt[known:]])
            reply = self._submit(prompt, len(job.output))
            replies.append(reply)
            await reply.result()
            at = time.perf_counter() - self._began
            prompt = np.concatenate([prompt, np.array(reply.tokens, np.int32)])
            known = len(prompt)

    def _submit(self, prompt: Ids, tokens: int, *, cacheable: bool = True) -> Reply:
        self._sent += 1
        params = GenerationParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
        item = Submission(prompt=prompt.tolist(), params=params, rid=str(self._sent), cacheable=cacheable)
        return self._client.submit(MODEL, TASK, [item])[0]


@asynccontextmanager
async def running(
    setting: Setting, count: int, *, scale: int = 1, routing: type[PrefixRouting] = PrefixRouting
) -> AsyncIterator[Replicas]:
    """``count`` replicas, each ``scale`` times as large and fast, and a front, which routes by ``routing``."""
    host = Host.load()
    cost = setting.cost
    numbers = map(str, (cost.fixed, cost.per_token, cost.per_decode, scale))
    command = (sys.executable, str(ENGINE), *numbers)
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder), setting.size.longest)
        config = Config.load(_settings(folder, setting, scale), host)
        connect = supervised(config, command=command)
        relays = {name: Relay(connect) for name in replica_names(count)}
        with mock.patch.object(cluster_replicas, "PrefixRouting", routing):
            client = Client(config, host, lambda *calls: ReplicaTransport([LocalHandle(relays)], *calls))
        try:
            await asyncio.gather(*(relay.start("127.0.0.1") for relay in relays.values()))
            await client.start()
            async with asyncio.timeout(10):
                while len(client.replicas) < count:
                    await asyncio.sleep(0.01)
            yield Replicas(client, setting, scale)
        finally:
            await client.stop()
            await asyncio.gather(*(relay.stop() for relay in relays.values()))


def _make_model(folder: Path, longest: int) -> None:
    """A random decoder whose passes take a few milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _settings(folder: str, setting: Setting, scale: int) -> dict[str, object]:
    size = setting.size
    model = {
        "model_path": folder,
        "served_model_name": MODEL,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_total_tokens": size.slots * scale,
        "chunked_prefill_size": size.chunk * scale,
        "max_running_requests": size.running * scale,
        "context_length": size.longest,
    }
    settings = {"engine": {"device": "cpu", "threads": 1}, "server": {"log_level": "warning"}}
    return {"models": [model], "settings": settings}
