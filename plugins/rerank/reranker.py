"""``Reranker``: prompts, answer tokens and scores of one served model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    PreparedInput,
    Truncation,
    check_characters,
    clip_text,
    locate_errors,
    read_truncate,
    too_long_error,
    truncate_ids,
)
from trunkline.core.types import ServedModel, Tokenizer

from .detect import ACTIVATIONS, activation_name, is_language_model, logit_score, sigmoid
from .prompts import JudgePrompter, PairPrompter, Prompt, Prompter
from .schemas import RerankParams, RerankResult
from .settings import RerankSettings

MAX_CHUNKED = 1 << 16  # limit on the tokens of a document that is split into chunks
WORDS = (("yes", "no"), ("Yes", "No"))  # answers of causal rerankers; the first pair of single tokens is used


class Limits(Struct, frozen=True):
    """Limits on prompts in tokens, and the treatment of longer ones.

    ``how``: the end of the document that is cut off, or "none". ``document``: limit on the document
    alone, to which it is always cut. ``chunks`` > 1: a document that is too long is split into up to
    ``chunks`` prompts, and the best of their scores counts.
    """

    prompt: int
    how: str = "none"
    document: int | None = None
    chunks: int = 1

    @property
    def cuts(self) -> bool:
        return self.how != "none" or self.document is not None or self.chunks > 1

    @classmethod
    def of(cls, served: ServedModel, truncate: Truncation) -> Limits:
        return cls(served.max_request_tokens, read_truncate(truncate))


class Field(Struct, frozen=True):
    """A field of the body under the client's name, for errors. ``single``: it has one text for all pairs."""

    name: str
    single: bool = False


QUERY, DOCUMENTS = Field("query", single=True), Field("documents")


class Reranker:
    """Makes prompts and interprets results for one model. Only CPU work; usable without a server."""

    def __init__(self, served: ServedModel, tokenizer: Tokenizer | None, settings: RerankSettings) -> None:
        """RequestError when the model can't rerank with this tokenizer or these settings."""
        if tokenizer is None:
            raise RequestError(f"{served.name} has no tokenizer and cannot accept text.")
        self.served = served
        self.tokenizer = tokenizer
        self.by_labels = is_language_model(served.info)
        self.settings = settings
        self._prompter: Prompter | None = None
        self._activation: Callable[[float], float] = (
            sigmoid if self.by_labels else ACTIVATIONS[activation_name(served.info)]
        )
        self._answers: RerankParams | None = None

    @property
    def prompter(self) -> Prompter:
        """Made at the first use: label scoring doesn't need a chat template."""
        if self._prompter is None:
            self._prompter = self._make_prompter()
        return self._prompter

    def _make_prompter(self) -> Prompter:
        style, template = self.settings.rerank_prompt, self.tokenizer.chat_template
        if style == "auto":
            style = "judge" if self.by_labels or template else "pair"
        if style == "pair" or not self.served.info.causal:
            return PairPrompter(self.tokenizer)
        if not template:
            raise RequestError(
                f"{self.served.name} has no chat template to ask for yes or no with; give one with --chat-template, "
                "or use `--rerank-prompt pair`."
            )
        return JudgePrompter(self.tokenizer, self.settings.rerank_instruct)

    @property
    def params(self) -> RerankParams:
        """Parameters for the engine: the answer tokens of causal models; none for score heads."""
        if self._answers is None:
            self._answers = RerankParams(self._answer_tokens() if self.by_labels else ())
        return self._answers

    def _answer_tokens(self) -> tuple[int, ...]:
        """Ids of the answer tokens for relevant and, in most models, for irrelevant."""
        if (given := logit_score(Path(self.served.info.path))) is not None:
            return tuple(token for token in given if token is not None)
        for words in WORDS:
            ids = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
            if all(len(one) == 1 for one in ids) and ids[0] != ids[1]:
                return ids[0][0], ids[1][0]
        raise RequestError(f"{self.served.name} can't rerank: its tokenizer has no single tokens for yes and no.")

    # -- prompts -----------------------------------------------------------------------------

    def items(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        limits: Limits,
        *,
        instruct: str | None = None,
        first: int = 0,
        fields: tuple[Field, Field] = (QUERY, DOCUMENTS),
    ) -> list[list[PreparedInput]]:
        """The prompts of each pair: one, or several if the document is split into chunks.

        For errors, ``first`` is the index of the first pair in its request, and ``fields`` are the fields of
        the queries and the documents. RequestError for pairs that are too long, and for an instruction if
        the model's prompt has none.
        """
        if instruct and not self.prompter.takes_instruct:
            raise RequestError(f"{self.served.name} takes no instruction; leave `instruct` out.", param="instruct")
        kept = []
        of_query, of_document = fields
        for index, (query, document) in enumerate(zip(queries, documents, strict=True), first):
            with locate_errors(of_query.name, index, single=of_query.single):
                check_characters(len(query) + len(instruct or ""), limits.prompt)
            with locate_errors(of_document.name, index, single=of_document.single):
                kept.append(self.bounded(document, limits))
        pieces = self.fitted(self.prompter(queries, kept, instruct), limits, first=first, fields=fields)
        return uncounted(pieces, documents, kept)

    def fitted(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        *,
        first: int = 0,
        fields: tuple[Field, Field] = (QUERY, DOCUMENTS),
    ) -> list[list[PreparedInput]]:
        """Truncate or split prompts as ``limits`` say. RequestError for a text that is too long."""
        pieces = []
        of_query, of_document = fields
        for index, prompt in enumerate(prompts, first):
            with locate_errors(of_query.name, index, single=of_query.single):
                check_room(prompt, limits)
            with locate_errors(of_document.name, index, single=of_document.single):
                pieces.append(fit_prompt(prompt, limits))
        return pieces

    def bounded(self, text: str, limits: Limits) -> str:
        """Clip a very long text before it is tokenised. RequestError if truncation is off."""
        how = limits.how if limits.how == "start" or not limits.cuts else "end"
        wanted = limits.prompt * limits.chunks
        tokens = min(wanted, max(limits.prompt, MAX_CHUNKED))
        part = clip_text(self.tokenizer, text, tokens, how, special=False)
        if part is not text and tokens < wanted:
            raise RequestError(
                f"The document has over {tokens} tokens, the most that are split into chunks: send it in parts, or set "
                f"max_chunks_per_doc to {tokens // limits.prompt} at most to have the rest ignored.",
                param="max_chunks_per_doc",
            )
        return part

    def prepare(self) -> None:
        """Make the prompter and the answer tokens, which may take a while. RequestError when the model can't rerank."""
        _ = self.prompter, self.params

    # -- scores ------------------------------------------------------------------------------

    def logit(self, data: Any) -> float:
        """The raw score of a stage's result: the head's logit, or the log odds of relevant."""
        values = read_values(data)
        if not self.by_labels or len(self.params.labels) == 1:
            return float(values[0])
        return float(values[0]) - float(values[1])

    def score(self, logit: float) -> float:
        """The score: p(yes) for causal models, else the checkpoint's activation of the logit."""
        return self._activation(logit)


def read_values(data: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The values of a stage's result, float32 ``[n]``."""
    return np.frombuffer(msgspec.convert(data, RerankResult).values, "<f4")


def check_room(prompt: Prompt, limits: Limits) -> None:
    """RequestError when the rest of the prompt leaves no room for the document."""
    fixed = len(prompt.head) + len(prompt.tail)
    if limits.prompt - fixed < min(1, len(prompt.document)):
        raise RequestError(
            f"The query leaves no room for a document: with the special tokens it takes {fixed} tokens of the "
            f"model's context length ({limits.prompt} tokens). Only documents are truncated."
        )


def fit_prompt(prompt: Prompt, limits: Limits) -> list[PreparedInput]:
    """One item, or several chunks; RequestError when the document is too long."""
    document, end = prompt.document, "start" if limits.how == "start" else "end"
    if limits.document is not None:
        document, _ = truncate_ids(document, limits.document, end, 0, 0)
    fixed = len(prompt.head) + len(prompt.tail)
    room = limits.prompt - fixed
    if len(document) > room and limits.how == "none" and limits.chunks == 1:
        raise too_long_error(fixed + len(document), limits.prompt)
    if limits.chunks == 1:
        chunks = [truncate_ids(document, room, end, 0, 0)[0]]
    else:
        starts = range(0, max(1, len(document)), max(1, room))[: limits.chunks]
        chunks = [document[start : start + room] for start in starts]
    cut = sum(map(len, chunks)) < len(prompt.document)
    whole = len(prompt) if cut else 0
    return [PreparedInput(prompt.head + chunk + prompt.tail, prompt.second_at, cut, whole) for chunk in chunks]


def uncounted(
    pieces: list[list[PreparedInput]], texts: Sequence[str], kept: Sequence[str]
) -> list[list[PreparedInput]]:
    """The same pieces, without the number of tokens before truncation where the text was clipped to ``kept``."""
    for items, text, part in zip(pieces, texts, kept, strict=True):
        if part is not text:
            for item in items:
                item.whole = 0
    return pieces
