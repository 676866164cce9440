"""Submits checked requests to the engine; used by the routes of both dialects and from Python."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from trunkline.core.errors import ConfigError, RequestError
from trunkline.core.server.api import PerModel, check_vocabulary, locate_errors, new_rid, too_long_error, wait_for_all
from trunkline.core.types import INT64_MIN, EngineClient, Int64, Reply, ServedModel, Settings, Submission, Tokenizer
from trunkline.plugins.generation.formats.model_format import ModelFormat
from trunkline.plugins.generation.native.meta_info import ExtraMetaInfo
from trunkline.plugins.generation.native.session_prompts import SessionPrompts
from trunkline.plugins.generation.native.sessions import Sessions
from trunkline.plugins.generation.sampling.params import DETERMINISTIC_SEED, SamplingParams, parse_sampling_params

from .extras import NO_EXTRAS, Extras, ResultReader
from .schemas import GenerationParams, GenerationResult, Grammar
from .sequence import OutputSequence
from .settings import GROUP, TASK, GenerationSettings, input_limit, new_token_limit

ON_LOOP = 8  # sequences that are decoded on the event loop; more are decoded in a thread
GRAMMAR_SECONDS = 2.0  # that the headers of a stream wait for its grammar; it is compiled within milliseconds
ON_LOOP_BYTES = 1 << 15  # size of the results that are encoded on the event loop


class Job(Struct, frozen=True, kw_only=True):
    """A checked request: its prompts, with ``n`` sequences for each, in prompt-major order.

    ``field``: the field of the body that has the prompts, for errors. ``single``: it has one prompt, not a list.
    """

    served: ServedModel
    prompts: list[list[int]]
    sampling: list[SamplingParams]  # for each prompt, all with the same n
    rids: list[str]  # for each sequence
    priority: Int64 = 0
    salts: list[bytes]  # for each prompt
    embeds: list[bytes] = []  # for each prompt, or empty: see Submission.embeds
    session_prompts: SessionPrompts | None = None
    field: str = "prompt"
    single: bool = True
    return_prompt: bool = False  # records have the prompt's token ids
    extras: list[Extras] = []  # for each prompt, or empty
    kept: frozenset[int] = frozenset()  # ids of special tokens that are in the text although others are skipped
    # The reader of the results of a sequence of a prompt, by its index; None: that of /generate.
    make_reader: Callable[[int, Tokenizer | None], ResultReader] | None = None

    def extras_of(self, index: int) -> Extras:
        """The extra outputs of prompt ``index``."""
        return self.extras[index] if self.extras else NO_EXTRAS

    def reader(self, index: int, tokenizer: Tokenizer | None) -> ResultReader | None:
        """A reader for the results of a sequence of prompt ``index``; None if it has no extra outputs."""
        extras = self.extras_of(index)
        if extras is NO_EXTRAS:
            return None
        if self.make_reader is not None:
            return self.make_reader(index, tokenizer)
        return ExtraMetaInfo(extras, self.prompts[index], self.served.info.hidden_size, tokenizer)

    @property
    def n(self) -> int:
        return self.sampling[0].n if self.sampling else 1

    def submission(self, index: int, prompt: list[int], params: GenerationParams, rid: str) -> Submission:
        """A sequence of prompt ``index``, as it is submitted to the engine."""
        return Submission(
            prompt=prompt,
            params=params,
            rid=rid,
            priority=self.priority,
            salt=self.salts[index],
            embeds=self.embeds[index] if self.embeds else b"",
            volatile=("seed", "group"),
        )

    @property
    def one_sequence(self) -> bool:
        """Whether the reply is one record, not a list: for a prompt that isn't in a list, with n = 1."""
        return self.single and self.n == 1


class Service:
    """The generation task in the front: checks limits, chooses seeds, submits.

    ``preferred``: the sampling parameters of each model's requests, where these don't set others.
    """

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self.sessions = Sessions()
        self.preferred = PerModel(lambda served: read_preferred(self.settings(served).preferred_sampling_params))
        self.formats = PerModel(self._format)
        self.max_batch: int = settings["server"].max_batch_size
        self._random = random.Random(settings["engine"].random_seed)

    def settings(self, served: ServedModel) -> GenerationSettings:
        """The settings of the task as they apply to a model."""
        settings: GenerationSettings = self.engine.settings(served.name)[GROUP]
        return settings

    def _format(self, served: ServedModel) -> ModelFormat:
        """The format of the replies of a model, which has a tokenizer."""
        tokenizer, settings = self.engine.tokenizer(served.name), self.settings(served)
        assert tokenizer is not None
        return ModelFormat(tokenizer, settings.tool_call_parser, settings.reasoning_parser)

    def sampling_params(
        self,
        served: ServedModel,
        requested: dict[str, Any],
        names: Mapping[str, str] | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Check a request's parameters; its arguments and errors are those of :func:`parse_sampling_params`."""
        preferred = self.preferred.get(served)
        sampling = parse_sampling_params(requested, preferred, names, served.info.vocab_size, grammar)
        limit = self.settings(served).max_n
        if sampling.n > limit:
            raise RequestError(f"n must be at most {limit}, got {sampling.n}; --max-n sets the limit.", param="n")
        return sampling

    def check_batch_size(self, prompts: int, n: int) -> None:
        """RequestError for more sequences than a request may have (``--max-batch-size``)."""
        if prompts * n > self.max_batch:
            raise RequestError(
                f"The request asks for {prompts * n} sequences ({prompts} prompts, n = {n}); at most "
                f"{self.max_batch} are allowed. Split it, or raise --max-batch-size."
            )

    async def submit(self, job: Job) -> list[OutputSequence]:
        """Queue the sequences of a job, and return them. The caller waits for them and calls :meth:`close` at the end.

        With n > 1 each prompt is first computed once, so that all samples find it in the prefix cache. If one of these
        prefills is aborted meanwhile, so are the samples.
        """
        prefills = await self._prefill(job) if job.n > 1 else {}
        prompt_results = {
            index: reply.results
            for index, reply in prefills.items()
            if job.extras_of(index).prompt_logprobs and not was_aborted(reply)
        }
        items = self._submissions(job, {index: _weights_id(results) for index, results in prompt_results.items()})
        if job.session_prompts is not None:
            job.session_prompts.check_unchanged()
        replies = self.engine.submit(job.served.name, TASK, items)
        if job.session_prompts is not None:
            job.session_prompts.add_requests(replies)
        if any(was_aborted(reply) for reply in prefills.values()):
            for reply in replies:
                reply.cancel()
        tokenizer = self.engine.tokenizer(job.served.name)
        sequences = []
        for position, (reply, item) in enumerate(zip(replies, items, strict=True)):
            index = position // job.n
            reader, results = job.reader(index, tokenizer), prompt_results.get(index, ())
            sampling = job.sampling[index]
            sequence = OutputSequence(reply, item.prompt, sampling, job.served, tokenizer, reader, results, job.kept)
            if job.return_prompt:
                sequence.prompt_ids = [] if item.embeds else item.prompt
            sequences.append(sequence)
        return sequences

    async def submit_checked(self, job: Job) -> list[OutputSequence]:
        """:meth:`submit`, and the error of a grammar that can't be compiled: a stream has no status for it later.

        Waits until the sequences run, for at most ``GRAMMAR_SECONDS``.
        """
        sequences = await self.submit(job)
        if all(sampling.grammar is None for sampling in job.sampling):
            return sequences
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(GRAMMAR_SECONDS):
                    await asyncio.gather(*(sequence.reply.begun() for sequence in sequences))
            for sequence in sequences:
                sequence.raise_for_error()
        except BaseException:
            self.close(sequences)
            raise
        return sequences

    async def _prefill(self, job: Job) -> dict[int, Reply]:
        """Compute each prompt once, for the prefix cache and for its log-probabilities. Replies by prompt index."""
        indices = [index for index, prompt in enumerate(job.prompts) if len(prompt) > 1]
        if not indices:
            return {}
        replies = self.engine.submit(job.served.name, TASK, [
            job.submission(
                index,
                job.prompts[index],
                GenerationParams(max_new_tokens=0, logprobs=job.extras_of(index).prompt_logprobs),
                new_rid(),
            )
            for index in indices
        ])  # fmt: skip
        await wait_for_all(replies)
        return dict(zip(indices, replies, strict=True))

    def close(self, sequences: Sequence[OutputSequence]) -> None:
        """Abort the sequences that still run."""
        for sequence in sequences:
            sequence.reply.cancel()

    async def complete(self, job: Job) -> list[OutputSequence]:
        """Submit a job and wait for its end. Raises the first failure.

        If a sequence fails, or the caller is cancelled, all sequences are aborted.
        """
        sequences = await self.submit(job)
        await wait_for_all([sequence.reply for sequence in sequences])
        for index, sequence in enumerate(sequences):
            with locate_errors(job.field, index // job.n, single=job.single):
                sequence.raise_for_error()
        pending_bytes = sum(sequence.pending_bytes for sequence in sequences)
        if len(sequences) <= ON_LOOP and pending_bytes <= ON_LOOP_BYTES:
            refresh_all(sequences)
        else:
            await self.engine.off_loop(refresh_all, sequences, size=pending_bytes)
        return sequences

    async def refresh(self, sequence: OutputSequence) -> None:
        """Call :meth:`OutputSequence.refresh`, first off the event loop if there is much to encode."""
        while sequence.pending_bytes > ON_LOOP_BYTES:
            await self.engine.off_loop(sequence.refresh, size=sequence.pending_bytes)
        sequence.refresh()

    def _submissions(self, job: Job, known: Mapping[int, int | None]) -> list[Submission]:
        """All sequences. ``known``: by prompt index, the weights with which its log-probabilities were computed."""
        limit = job.served.max_request_tokens
        items: list[Submission] = []
        group = new_rid()
        for index, (prompt, sampling) in enumerate(zip(job.prompts, job.sampling, strict=True)):
            requested = limit if sampling.max_new_tokens is None else sampling.max_new_tokens
            max_new_tokens = new_token_limit(len(prompt), requested, limit)
            if (seed := sampling.sampling_seed) is None:
                seed = DETERMINISTIC_SEED if job.served.deterministic else self._random.getrandbits(63)
            extras = job.extras_of(index)
            if index in known:
                extras = extras.with_prompt_known(known[index])
            for sample in range(job.n):
                params = extras.added_to(sampling.for_engine(max_new_tokens, _wrap_int64(seed + sample), group))
                items.append(job.submission(index, prompt, params, job.rids[len(items)]))
        return items


def _weights_id(results: Sequence[Any]) -> int | None:
    """The id of the weights that computed a prompt's log-probabilities, by the results of its request."""
    return msgspec.convert(results[-1], GenerationResult).weights_id if results else None


def _wrap_int64(seed: int) -> int:
    """``seed`` modulo 2**64, as an int64."""
    return (seed - INT64_MIN) % (1 << 64) + INT64_MIN


def refresh_all(sequences: Sequence[OutputSequence]) -> None:
    """Refresh several sequences; see :meth:`OutputSequence.refresh`."""
    for sequence in sequences:
        sequence.refresh()


def was_aborted(reply: Reply) -> bool:
    return (reply.finish or {}).get("type") == "abort"


def read_preferred(text: str | None) -> dict[str, Any]:
    """The parameters in ``--preferred-sampling-params``. ConfigError if they are invalid."""
    if text is None:
        return {}
    try:
        preferred = msgspec.json.decode(text, type=dict[str, Any])
        parse_sampling_params(preferred)
    except (msgspec.MsgspecError, RequestError) as error:
        raise ConfigError(
            f"--preferred-sampling-params must be a JSON object of sampling parameters: {error}"
        ) from None
    return preferred


def check_prompt(prompt: Sequence[int], served: ServedModel, field: str = "input_ids") -> None:
    """RequestError for a prompt that is empty or too long, or has ids (in ``field``) outside the vocabulary."""
    context, length = served.info.context_length, len(prompt)
    if not prompt:
        raise RequestError("The prompt has no tokens; at least one is needed.")
    if length >= context:
        raise too_long_error(length, context)
    limit = input_limit(served)
    if length >= limit:
        raise RequestError(
            f"Input length ({length} tokens) exceeds the maximum allowed length ({limit} tokens). Use a shorter input."
        )
    check_vocabulary(prompt, served, field)
