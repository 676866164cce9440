"""Generates traffic: chats, questions about documents, few-shot batches and unique prompts, from a seed.

It is made up, no recording. Lengths and shares are guesses at a mixed service; :class:`Mix` has them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
VOCABULARY = 50_000
LONGEST = 6_000  # tokens of a prompt; a chat that is longer ends


@dataclass(frozen=True)
class Mix:
    """Shares of sessions and lengths in tokens. Lengths are means of log-normal distributions, unless said otherwise.

    ``documents``: how many there are for 4 replicas; their number grows with that of the replicas, as do users.
    """

    chat: float = 0.35  # sessions of several turns …
    turns: float = 4.0  # … geometric
    think: float = 10.0  # seconds between an answer and the next turn, exponential
    chat_system: int = 400  # shared by all chats, exactly
    question: int = 80
    answer: int = 40
    document: float = 0.35  # sessions of one question about a document
    documents: int = 120
    zipf: float = 1.0  # exponent of the documents' popularity
    document_tokens: int = 1200
    few_shot: float = 0.05  # sessions of several prompts at once with the same examples
    batch: int = 8  # prompts, exactly
    examples: int = 900
    unique: float = 0.25  # sessions of one prompt that shares nothing
    unique_tokens: int = 300


HOT = Mix(
    chat=0.8, turns=3.0, chat_system=2000, question=150, document=0.05, few_shot=0.02, unique=0.13
)  # most prompts begin with the same 2000 tokens: more than one replica can serve


@dataclass(eq=False)
class Job:
    """One request of a session; its output is known from the beginning. ``after``: seconds since the one before ended,
    or since the session's arrival."""

    prompt: Ids
    output: Ids
    after: float = 0.0


@dataclass(eq=False)
class Session:
    """Requests that arrive at ``at`` seconds, all at once; or one after another, if ``turns``."""

    at: float
    jobs: list[Job] = field(default_factory=list)
    turns: bool = False


class Traffic:
    """Sessions with Poisson arrivals, the same ones for the same arguments."""

    def __init__(self, *, seed: int, replicas: int, mix: Mix | None = None) -> None:
        self.mix = mix or Mix()
        self._rng = np.random.default_rng(seed)
        count = max(1, self.mix.documents * replicas // 4)
        self._documents = [self._ids(self.mix.document_tokens) for _ in range(count)]
        popularity = 1.0 / np.arange(1, count + 1) ** self.mix.zipf
        self._popularity = popularity / popularity.sum()
        self._system = self._rng.integers(1, VOCABULARY, self.mix.chat_system, dtype=np.int32)

    def sessions(self, rate: float, seconds: float) -> Iterator[Session]:
        """``rate`` sessions per second, on average."""
        mix, at = self.mix, 0.0
        kinds = (self._chat, self._question, self._few_shot, self._unique)
        shares = np.array([mix.chat, mix.document, mix.few_shot, mix.unique])
        while (at := at + float(self._rng.exponential(1 / rate))) < seconds:
            yield kinds[self._rng.choice(len(kinds), p=shares / shares.sum())](at)

    def _ids(self, mean: int) -> Ids:
        """Random tokens of a random number."""
        length = int(np.clip(self._rng.lognormal(np.log(mean) - 0.125, 0.5), 4, LONGEST // 2))
        return self._rng.integers(1, VOCABULARY, length, dtype=np.int32)

    def _chat(self, at: float) -> Session:
        mix, history = self.mix, self._system
        session = Session(at, turns=True)
        for turn in range(int(self._rng.geometric(1 / mix.turns))):
            prompt = np.concatenate([history, self._ids(mix.question)])
            if len(prompt) > LONGEST:
                break
            answer = self._ids(mix.answer)
            session.jobs.append(Job(prompt, answer, float(self._rng.exponential(mix.think)) if turn else 0.0))
            history = np.concatenate([prompt, answer])
        return session

    def _question(self, at: float) -> Session:
        document = self._documents[self._rng.choice(len(self._documents), p=self._popularity)]
        prompt = np.concatenate([document, self._ids(self.mix.question)])
        return Session(at, [Job(prompt, self._ids(self.mix.answer))])

    def _few_shot(self, at: float) -> Session:
        examples = self._ids(self.mix.examples)
        prompts = [np.concatenate([examples, self._ids(self.mix.question)]) for _ in range(self.mix.batch)]
        return Session(at, [Job(prompt, self._ids(8)) for prompt in prompts])

    def _unique(self, at: float) -> Session:
        return Session(at, [Job(self._ids(self.mix.unique_tokens), self._ids(self.mix.answer))])
