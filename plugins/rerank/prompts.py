"""Makes token ids from a query and a document, for each kind of model.

The document's ids are kept separately, because only the document is truncated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.server.api import contents_for_template

from .detect import knows_pair_roles

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
# Placeholders for the texts while the chat template is rendered, so that texts aren't interpreted by the template.
PLACES = {"instruct": "\u27e6instruct\u27e7", "query": "\u27e6query\u27e7", "document": "\u27e6document\u27e7"}
PLACE = re.compile("|".join(PLACES.values()))


class Prompt(Struct, frozen=True):
    """Token ids before, of and after the document. ``second_at``: index at which token type 1 begins, None if none."""

    head: list[int]
    document: list[int]
    tail: list[int]
    second_at: int | None = None

    def __len__(self) -> int:
        return len(self.head) + len(self.document) + len(self.tail)


class Prompter(Protocol):
    """Makes one prompt per pair; only CPU work."""

    takes_instruct: bool

    def __call__(self, queries: Sequence[str], documents: Sequence[str], instruct: str | None) -> list[Prompt]: ...


class PairPrompter:
    """Joins query and document as the tokenizer joins pairs of texts, with its special tokens and token types."""

    takes_instruct = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._typed = "token_type_ids" in tokenizer.model_input_names

    def __call__(self, queries: Sequence[str], documents: Sequence[str], instruct: str | None) -> list[Prompt]:
        return [self._prompt(encoding) for encoding in _encode(self._tokenizer, queries, documents)]

    def _prompt(self, encoding: Any) -> Prompt:
        ids, owners = encoding.ids, encoding.sequence_ids
        first = owners.index(1) if 1 in owners else len(ids)
        last = len(ids) - owners[::-1].index(1) if 1 in owners else len(ids)
        types = encoding.type_ids if self._typed else []
        second_at = types.index(1) if 1 in types else None
        return Prompt(ids[:first], ids[first:last], ids[last:], second_at)


class JudgePrompter:
    """Makes a chat prompt that asks for yes or no.

    Templates that handle the roles ``query`` and ``document`` get these (and the instruction as the
    system message); others get the messages that Qwen3-Reranker was trained with. The instruction and
    the query come before the document, so that they are a common cached prefix of a query's documents.
    """

    def __init__(self, tokenizer: Any, instruct: str | None = None) -> None:
        """``instruct`` is the default instruction. RequestError when the chat template doesn't render a pair."""
        self._tokenizer = tokenizer
        self._roles = knows_pair_roles(tokenizer.chat_template)
        self._default = instruct or (None if self._roles else INSTRUCT)
        self._plain = self._skeleton(with_instruct=False) if self._roles else ""
        self._instructed = self._skeleton(with_instruct=True)
        self.takes_instruct = PLACES["instruct"] in self._instructed

    def _skeleton(self, *, with_instruct: bool) -> str:
        """The rendered chat with placeholders for the texts."""
        if self._roles:
            turns = [{"role": role, "content": PLACES[role]} for role in ("query", "document")]
            if with_instruct:
                turns.insert(0, {"role": "system", "content": PLACES["instruct"]})
        else:
            fields = "<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"
            turns = [{"role": "system", "content": JUDGE}, {"role": "user", "content": fields.format(**PLACES)}]
        try:
            text: str = self._tokenizer.apply_chat_template(
                contents_for_template(self._tokenizer, turns),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # a template may raise anything
            raise RequestError(f"The model's chat template can't be used for reranking: {error}") from error
        if text.count(PLACES["document"]) != 1 or PLACES["query"] not in text:
            raise RequestError(
                "The model's chat template leaves out the query or the document; give one that knows the roles "
                "`query` and `document` with --chat-template, or use `--rerank-prompt pair`."
            )
        return text

    def __call__(self, queries: Sequence[str], documents: Sequence[str], instruct: str | None) -> list[Prompt]:
        chosen = instruct or self._default
        skeleton = self._plain if chosen is None else self._instructed
        before, after = skeleton.split(PLACES["document"])
        heads = [_fill(before, instruct=chosen or "", query=query) for query in queries]
        tails = [_fill(after, instruct=chosen or "", query=query) for query in queries]
        return split_prompts(self._tokenizer, heads, documents, tails, special=False)


def split_prompts(
    tokenizer: Any, heads: Sequence[str], documents: Sequence[str], tails: Sequence[str], *, special: bool
) -> list[Prompt]:
    """Tokenise each text as a whole, then split its ids where the document begins and ends.

    A token that spans such a border belongs to the document. ``special`` adds the tokenizer's special tokens.
    """
    texts = [head + document + tail for head, document, tail in zip(heads, documents, tails, strict=True)]
    encodings = _encode(tokenizer, texts, None, special=special)
    prompts = []
    for encoding, head, document in zip(encodings, heads, documents, strict=True):
        first, last = _span(encoding, len(head), len(head) + len(document))
        prompts.append(Prompt(encoding.ids[:first], encoding.ids[first:last], encoding.ids[last:]))
    return prompts


def _span(encoding: Any, begin: int, end: int) -> tuple[int, int]:
    """Range of the tokens that overlap the characters ``[begin, end)``; special tokens don't."""
    touching = [
        index
        for index, (owner, (start, stop)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
        if owner is not None and start < end and stop > begin
    ]
    if touching:
        return touching[0], touching[-1] + 1
    before = sum(stop <= begin for _, stop in encoding.offsets)  # special tokens have the offsets (0, 0)
    return before, before


def _encode(tokenizer: Any, texts: Sequence[str], seconds: Sequence[str] | None, *, special: bool = True) -> list[Any]:
    """``tokenizers.Encoding`` of each text or pair, neither padded nor truncated."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError("Reranking needs a fast tokenizer (tokenizer.json), which this model doesn't have.")
    batch = tokenizer(list(texts), None if seconds is None else list(seconds), add_special_tokens=special)
    encodings: list[Any] = batch.encodings
    return encodings


def _fill(text: str, **values: str) -> str:
    """Replace all placeholders at once, so that a placeholder in a text isn't replaced."""
    names = {place: name for name, place in PLACES.items()}
    return PLACE.sub(lambda match: values[names[match.group()]], text)
