"""One generated sequence as its client sees it: the text of the reply's tokens, and its ``meta_info``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Usage, token_usage
from trunkline.core.types import Reply, ServedModel, Tokenizer
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.text.visible import VisibleText

from .extras import ResultReader
from .schemas import GenerationResult

COUNTED_BLOCK = 64  # tokens that are decoded at once where no position is searched


class OutputSequence:
    """Follows a :class:`Reply`. ``text`` only grows, and has no stop string or beginning of one.

    ``text`` is None without a tokenizer. ``prompt_ids``: the prompt, if the client wants it in the record.
    """

    def __init__(
        self,
        reply: Reply,
        prompt: list[int],
        sampling: SamplingParams,
        served: ServedModel,
        tokenizer: Tokenizer | None,
        reader: ResultReader | None = None,
        prompt_results: Sequence[Any] = (),
        kept: frozenset[int] = frozenset(),
    ) -> None:
        """``reader`` gets the reply's results; None: there are none.

        ``prompt_results``: results of another request for the same prompt, with its tokens' log-probabilities.
        ``kept``: see :class:`VisibleText`.
        """
        self.reply = reply
        self.served = served
        self._prompt_tokens = len(prompt)
        self._trim = not sampling.no_stop_trim
        self._stops = sampling.stop if self._trim else ()
        self._end_ids = None if sampling.grammar is None else _end_ids(sampling, served, tokenizer)
        self._new_text: Callable[[Sequence[str]], VisibleText] | None = None
        if tokenizer is not None:
            skip = sampling.skip_special_tokens
            self._new_text = lambda stops: VisibleText(
                tokenizer, prompt, skip_special_tokens=skip, stops=stops, kept=kept
            )
        self._visible = None if self._new_text is None else self._new_text(self._stops)
        self._decoded_tokens = 0  # tokens of the reply that are in the text
        self.complete = False  # the last refresh has seen the end of the reply
        self.reader = reader
        self._prompt_results = prompt_results
        self._encoded_results = 0  # results of the reply that are in the extra outputs
        self.text: str | None = None if self._visible is None else ""
        self.prompt_ids: list[int] | None = None

    @property
    def finish(self) -> dict[str, Any] | None:
        """The finish reason, None while the sequence runs. A failure is an abort with an HTTP status."""
        error = self.reply.error
        if error is not None:
            return {"type": "abort", "message": error.message, "status_code": error.status, "err_type": None}
        return self.reply.finish

    @property
    def finished(self) -> bool:
        return self.finish is not None

    @property
    def pending_bytes(self) -> int:
        """Size of the results that the next :meth:`refresh` will encode, times the cost of their layout."""
        if self.reader is None:
            return 0
        results = (*self._prompt_results, *self.reply.results[self._encoded_results :])
        return self.reader.cost * sum(map(_size, results))

    def refresh(self) -> None:
        """Update ``text`` and the extra outputs with the reply's new tokens and results.

        If it runs in a thread, call it once more on the event loop, where the reply doesn't change during the call.
        """
        if self.complete:
            return
        finish = self.finish  # read before the tokens: if it is set, no more tokens will come
        finished, matched = finish is not None, (finish or {}).get("matched")
        self._read_results(finished=finished)
        self.complete = finished
        if self._visible is None:
            return
        end = len(self.reply.tokens)
        if self._trim and isinstance(matched, int) and (self._end_ids is None or matched in self._end_ids):
            end -= 1  # the text doesn't have the stop token; where a grammar ends, another one is matched
        self._visible.push(self.reply.tokens[self._decoded_tokens : end])
        self._decoded_tokens = end
        if finished:
            # Only stop strings were held back and can be cut off. What an expression or a condition matched stays.
            self.text = self._visible.finish(matched if matched in self._stops else None)
        else:
            self.text = self._visible.so_far()

    def count_tokens(self, positions: Sequence[int]) -> list[int]:
        """For each of ascending positions: how many tokens, at least, have this many characters of the text.

        It decodes the text once more, and blocks with a position token by token.
        """
        assert self._new_text is not None
        ahead, text = self._new_text(()), self._new_text(())
        counts: list[int] = []
        for start in range(0, self._decoded_tokens, COUNTED_BLOCK):
            if len(counts) == len(positions):
                break
            block = self.reply.tokens[start : min(start + COUNTED_BLOCK, self._decoded_tokens)]
            ahead.push(block)
            if positions[len(counts)] > len(ahead.so_far()):
                text.push(block)
                continue
            lengths = [len(text.so_far())]
            for token in block:
                text.push([token])
                lengths.append(len(text.so_far()))
            end = bisect_right(positions, lengths[-1], len(counts))
            counts += [start + bisect_left(lengths, position) for position in positions[len(counts) : end]]
        return counts + [self._decoded_tokens] * (len(positions) - len(counts))

    def _read_results(self, *, finished: bool) -> None:
        if self.reader is None:
            return
        for result in self._prompt_results:
            self.reader.add_prompt(msgspec.convert(result, GenerationResult))
        self._prompt_results = ()
        new_results = self.reply.results[self._encoded_results :]
        for result in new_results:
            self.reader.add(msgspec.convert(result, GenerationResult))
        self._encoded_results += len(new_results)
        if finished:
            self.reader.finish()

    def raise_for_error(self) -> None:
        """Raise the RequestError with which the sequence failed, if it did. An abort by the client is no failure."""
        if self.reply.error is not None:
            raise self.reply.error
        finish = self.finish or {}
        if finish.get("type") == "abort" and finish.get("status_code") is not None:
            raise RequestError(finish["message"], status=finish["status_code"])

    def record(self) -> dict[str, Any]:
        """The record of SGLang's native API (``GenerateRecord``), as of the last :meth:`refresh`."""
        record: dict[str, Any] = {} if self.text is None else {"text": self.text}
        if self.prompt_ids is not None:
            record["prompt_token_ids"] = self.prompt_ids
        return record | {"output_ids": list(self.reply.tokens), "meta_info": self.meta_info()}

    def meta_info(self) -> dict[str, Any]:
        """The record's ``meta_info`` (``GenerateMeta``)."""
        reply = self.reply
        meta: dict[str, Any] = {
            "id": reply.rid,
            "finish_reason": self.finish,
            "prompt_tokens": self._prompt_tokens,
            "weight_version": reply.weight_version or self.served.weight_version,
            "completion_tokens": len(reply.tokens),
            "cached_tokens": reply.cached_tokens,
        }
        if reply.versions:  # weights were updated in a pause
            ends = [*reply.versions, (reply.weight_version, len(reply.tokens))]
            starts = [0, *(end for _, end in ends)]
            spans = [
                {"version": label, "start": start, "end": end}
                for (label, end), start in zip(ends, starts, strict=False)
                if start < end  # no token may have been generated with the latest weights
            ]
            meta |= {"weight_version": spans[-1]["version"], "weight_versions": spans}
        if self.reader is not None:
            meta |= self.reader.meta()
        if self.finished:
            meta["e2e_latency"] = reply.finished - reply.created
        return meta


def _end_ids(sampling: SamplingParams, served: ServedModel, tokenizer: Tokenizer | None) -> frozenset[int | None]:
    """The stop tokens of a request."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    chosen = () if sampling.ignore_eos else sampling.stop_token_ids
    return frozenset((*served.info.eos_token_ids, *chosen, own))


def _size(result: Any) -> int:
    """Total length of the bytes objects in a result of builtin types."""
    if isinstance(result, bytes):
        return len(result)
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, list) else ()
    return sum(_size(part) for part in parts)


def usage(sequences: Iterable[OutputSequence], samples: int) -> Usage:
    """OpenAI's token counts. The prompt is counted once for each ``samples`` neighbouring sequences."""
    metas = [sequence.meta_info() for sequence in sequences]
    prompt = sum(meta["prompt_tokens"] for meta in metas[::samples])
    completion = sum(meta["completion_tokens"] for meta in metas)
    return token_usage(prompt, completion, cached=sum(meta["cached_tokens"] for meta in metas[::samples]))
