"""From checked requests to sequences in the engine; both dialects' routes go through here."""

from __future__ import annotations

import random
from collections.abc import Container, Mapping
from collections.abc import Sequence as Listing
from typing import Any

import msgspec
from msgspec import Struct

from trunkline.core.errors import ConfigError, RequestError
from trunkline.core.server.api import PerModel, check_vocabulary, locate_errors, new_rid, too_long_error, wait_for_all
from trunkline.core.types import INT64_MIN, EngineClient, Int64, Reply, ServedModel, Settings, Submission
from trunkline.plugins.generation.native.sessions import Sessions
from trunkline.plugins.generation.native.turns import Turns
from trunkline.plugins.generation.sampling.params import Sampling, parse_sampling

from .extras import NOTHING, Extras
from .schemas import GenerationParams
from .sequence import Sequence
from .settings import GROUP, TASK, GenerationSettings, input_limit, new_token_limit

ON_LOOP = 8  # sequences whose text is decoded on the event loop; more go to a thread
BACKLOG = 1 << 15  # bytes of results that are encoded there


class Job(Struct, frozen=True, kw_only=True):
    """Prompts that are generated together: every prompt ``n`` times, in prompt-major order.

    ``field`` is what the client called them; errors say so. ``single``: it wasn't a list.
    """

    served: ServedModel
    prompts: list[list[int]]
    samplings: list[Sampling]  # one a prompt, all with the same n
    rids: list[str]  # one a sequence
    priority: Int64 = 0
    salts: list[bytes]  # one a prompt
    embeds: list[bytes] = []  # one a prompt, or none: see Submission.embeds
    turns: Turns | None = None  # what the prompts continue
    field: str = "prompt"
    single: bool = True
    show_prompt: bool = False  # records have the prompt's token ids
    extras: list[Extras] = []  # one a prompt, or none

    def extras_of(self, prompt: int) -> Extras:
        """What a prompt asks for beside text."""
        return self.extras[prompt] if self.extras else NOTHING

    @property
    def n(self) -> int:
        return self.samplings[0].n if self.samplings else 1

    def submission(self, index: int, prompt: list[int], params: GenerationParams, rid: str) -> Submission:
        """What the engine gets of prompt ``index``."""
        return Submission(
            prompt=prompt,
            params=params,
            rid=rid,
            priority=self.priority,
            salt=self.salts[index],
            embeds=self.embeds[index] if self.embeds else b"",
            volatile=("seed",),
        )

    @property
    def one_sequence(self) -> bool:
        """Whether it is one prompt, not in a list, and one sample of it: the reply is one object then, else a list."""
        return self.single and self.n == 1


class Service:
    """The front's part of generation: limits, seeds, submitting."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self.sessions = Sessions()
        self._preferred = PerModel(lambda served: read_preferred(self.settings(served).preferred_sampling_params))
        self.max_batch: int = settings["server"].max_batch_size
        self._random = random.Random(settings["engine"].random_seed)

    def settings(self, served: ServedModel) -> GenerationSettings:
        settings: GenerationSettings = self.engine.settings(served.name)[GROUP]
        return settings

    def preferred(self, served: ServedModel) -> dict[str, Any]:
        """Sampling parameters that the model's requests have where they don't say otherwise."""
        return self._preferred.get(served)

    def sampling(
        self, served: ServedModel, given: dict[str, Any], spelled: Mapping[str, str] | None = None
    ) -> Sampling:
        """Checked sampling parameters, over the preferred ones; ``spelled`` as in :func:`parse_sampling`."""
        sampling = parse_sampling(given, self.preferred(served), spelled, served.info.vocab_size)
        limit = self.settings(served).max_n
        if sampling.n > limit:
            raise RequestError(f"n must be at most {limit}, got {sampling.n}; --max-n sets the limit.", param="n")
        return sampling

    def check_batch(self, prompts: int, n: int) -> None:
        """RequestError when a request asks for more sequences than one request may."""
        if prompts * n > self.max_batch:
            raise RequestError(
                f"The request asks for {prompts * n} sequences ({prompts} prompts, n = {n}); at most "
                f"{self.max_batch} are allowed. Split it, or raise --max-batch-size."
            )

    async def run(self, job: Job) -> list[Sequence]:
        """Submit a job. The sequences are in the queue then; the caller waits for them and ends with :meth:`close`.

        With n > 1 the prompts are computed once first, so that all samples find them in the cache. Who aborts all
        requests then means the samples, too.
        """
        primes = await self._prime(job) if job.n > 1 else {}
        primed = {
            index: reply.results
            for index, reply in primes.items()
            if job.extras_of(index).of_prompt and not aborted(reply)
        }
        items = self._submissions(job, primed)
        if job.turns is not None:
            job.turns.claim()
        replies = self.engine.submit(job.served.name, TASK, items)
        if job.turns is not None:
            job.turns.record(replies)
        if any(aborted(prime) for prime in primes.values()):
            for reply in replies:
                reply.cancel()
        tokenizer = self.engine.tokenizer(job.served.name)
        sequences = []
        for index, (reply, item) in enumerate(zip(replies, items, strict=True)):
            prompt = index // job.n
            extras, results = job.extras_of(prompt), primed.get(prompt, ())
            sampling = job.samplings[prompt]
            sequence = Sequence(reply, item.prompt, sampling, job.served, tokenizer, extras, results)
            if job.show_prompt:
                sequence.prompt_ids = [] if item.embeds else item.prompt
            sequences.append(sequence)
        return sequences

    async def _prime(self, job: Job) -> dict[int, Reply]:
        """Compute all prompts once: for the cache, and for the log-probabilities of their tokens. By prompt."""
        indices = [index for index, prompt in enumerate(job.prompts) if len(prompt) > 1]
        if not indices:
            return {}
        replies = self.engine.submit(job.served.name, TASK, [
            job.submission(
                index,
                job.prompts[index],
                GenerationParams(max_new_tokens=0, logprobs=job.extras_of(index).of_prompt),
                new_rid(),
            )
            for index in indices
        ])  # fmt: skip
        await wait_for_all(replies)
        return dict(zip(indices, replies, strict=True))

    def close(self, sequences: Listing[Sequence]) -> None:
        """The sequences are over or unwanted: abort what still runs."""
        for sequence in sequences:
            sequence.reply.cancel()

    async def complete(self, job: Job) -> list[Sequence]:
        """Run a job to its end. Raises the first failure; then, and when the caller is cancelled, all is cancelled."""
        sequences = await self.run(job)
        await wait_for_all([sequence.reply for sequence in sequences])
        for index, sequence in enumerate(sequences):
            with locate_errors(job.field, index // job.n, single=job.single):
                sequence.check()
        backlog = sum(sequence.backlog for sequence in sequences)
        if len(sequences) <= ON_LOOP and backlog <= BACKLOG:
            refresh_all(sequences)
        else:
            await self.engine.off_loop(refresh_all, sequences, size=backlog)
        return sequences

    async def refresh(self, sequence: Sequence) -> None:
        """Bring a sequence up to date with its reply, off the event loop where that takes long."""
        while sequence.backlog > BACKLOG:
            await self.engine.off_loop(sequence.refresh, size=sequence.backlog)
        sequence.refresh()

    def _submissions(self, job: Job, primed: Container[int]) -> list[Submission]:
        """One for each sequence. ``primed``: prompts whose tokens' log-probabilities are known."""
        limit = job.served.max_request_tokens
        items: list[Submission] = []
        for index, (prompt, sampling) in enumerate(zip(job.prompts, job.samplings, strict=True)):
            wanted = limit if sampling.max_new_tokens is None else sampling.max_new_tokens
            allowed = new_token_limit(len(prompt), wanted, limit)
            seed = self._random.getrandbits(63) if sampling.sampling_seed is None else sampling.sampling_seed
            extras = job.extras_of(index).without_prompt() if index in primed else job.extras_of(index)
            for sample in range(job.n):
                params = extras.added_to(sampling.for_engine(allowed, _wrap(seed + sample)))
                items.append(job.submission(index, prompt, params, job.rids[len(items)]))
        return items


def _wrap(seed: int) -> int:
    """Into int64, as addition on the device would."""
    return (seed - INT64_MIN) % (1 << 64) + INT64_MIN


def refresh_all(sequences: Listing[Sequence]) -> None:
    for sequence in sequences:
        sequence.refresh()


def aborted(reply: Reply) -> bool:
    return (reply.finish or {}).get("type") == "abort"


def read_preferred(text: str | None) -> dict[str, Any]:
    """``--preferred-sampling-params``, checked when the server starts. ConfigError says what is wrong."""
    if text is None:
        return {}
    try:
        preferred = msgspec.json.decode(text, type=dict[str, Any])
        parse_sampling(preferred)
    except (msgspec.MsgspecError, RequestError) as error:
        raise ConfigError(
            f"--preferred-sampling-params must be a JSON object of sampling parameters: {error}"
        ) from None
    return preferred


def check_prompt(prompt: Listing[int], served: ServedModel) -> None:
    """Length and vocabulary of one prompt."""
    context, length = served.info.context_length, len(prompt)
    if not prompt:
        raise RequestError("The prompt has no tokens; at least one is needed.")
    if length >= context:
        raise too_long_error(length, context)
    allowed = input_limit(served)
    if length >= allowed:
        raise RequestError(
            f"Input length ({length} tokens) exceeds the maximum allowed length ({allowed} tokens). "
            "Use a shorter input."
        )
    check_vocabulary(prompt, served)
