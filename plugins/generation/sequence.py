"""One generated sequence as its client sees it: the reply's tokens as text, and its meta_info."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from typing import Any

import msgspec

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Usage, token_usage
from trunkline.core.types import Reply, ServedModel, Tokenizer
from trunkline.plugins.generation.native.logprob_layout import ExtraLists
from trunkline.plugins.generation.sampling.params import Sampling
from trunkline.plugins.generation.text.shown import ShownText

from .extras import NOTHING, Extras
from .schemas import GenerationResult


class Sequence:
    """Follows a :class:`Reply`. ``text`` only ever grows, and never shows a stop string or part of one."""

    def __init__(
        self,
        reply: Reply,
        prompt: list[int],
        sampling: Sampling,
        served: ServedModel,
        tokenizer: Tokenizer | None,
        extras: Extras = NOTHING,
        primed: Listing[Any] = (),
    ) -> None:
        """``primed``: results of another request with this prompt, which have the log-probabilities of its tokens."""
        self.reply = reply
        self.served = served
        self._prompt_tokens = len(prompt)
        self._trim = not sampling.no_stop_trim
        self._stops = sampling.stop if self._trim else ()
        self._shown = None
        if tokenizer is not None:
            skip = sampling.skip_special_tokens
            self._shown = ShownText(tokenizer, prompt, skip_special_tokens=skip, stops=self._stops)
        self._taken = 0  # tokens of the reply that are in the text
        self._over = False
        self._extras = None
        if extras is not NOTHING:
            self._extras = ExtraLists(extras, prompt, served.info.hidden_size, tokenizer)
        self._primed = primed
        self._read = 0  # results of the reply that are in the lists
        self.text: str | None = None if self._shown is None else ""
        self.prompt_ids: list[int] | None = None  # for the record, where the client wants them

    @property
    def finish(self) -> dict[str, Any] | None:
        """The finish reason; a failure counts as an abort that carries its HTTP status."""
        error = self.reply.error
        if error is not None:
            return {"type": "abort", "message": error.message, "status_code": error.status, "err_type": None}
        return self.reply.finish

    @property
    def over(self) -> bool:
        return self.finish is not None

    @property
    def backlog(self) -> int:
        """Bytes of results that the next :meth:`refresh` will encode."""
        if self._extras is None:
            return 0
        return sum(_weight(result) for result in (*self._primed, *self.reply.results[self._read :]))

    def refresh(self) -> None:
        """Bring ``text`` and the lists beside it up to date with the reply.

        It may run in a thread; then call it once more on the event loop, where the reply doesn't change meanwhile.
        """
        if self._over:
            return
        finish = self.finish  # read before the tokens: when it is there, they all are
        over, matched = finish is not None, (finish or {}).get("matched")
        self._refresh_extras(over=over)
        self._over = over
        if self._shown is None:
            return
        end = len(self.reply.tokens)
        if self._trim and isinstance(matched, int):
            end -= 1  # the stop token itself is not text
        self._shown.push(self.reply.tokens[self._taken : end])
        self._taken = end
        if over:
            # Only what was held back can be cut off: expressions and conditions end a text and stay in it.
            self.text = self._shown.finish(matched if matched in self._stops else None)
        else:
            self.text = self._shown.so_far()

    def _refresh_extras(self, *, over: bool) -> None:
        if self._extras is None:
            return
        for result in self._primed:
            self._extras.take_prompt(msgspec.convert(result, GenerationResult))
        self._primed = ()
        fresh = self.reply.results[self._read :]
        for result in fresh:
            self._extras.take(msgspec.convert(result, GenerationResult))
        self._read += len(fresh)
        if over:
            self._extras.close()

    def check(self) -> None:
        """Raise what ended the sequence abnormally; an ordinary abort (by the client) is a result."""
        if self.reply.error is not None:
            raise self.reply.error
        finish = self.finish or {}
        if finish.get("type") == "abort" and finish.get("status_code") is not None:
            raise RequestError(finish["message"], status=finish["status_code"])

    def record(self) -> dict[str, Any]:
        """The object of SGLang's native API, as of the last :meth:`refresh`; ids and text are cumulative."""
        record: dict[str, Any] = {} if self.text is None else {"text": self.text}
        if self.prompt_ids is not None:
            record["prompt_token_ids"] = self.prompt_ids
        return record | {"output_ids": list(self.reply.tokens), "meta_info": self.meta_info()}

    def meta_info(self) -> dict[str, Any]:
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
                if start < end  # it may have ended before a token was made with the latest weights
            ]
            meta |= {"weight_version": spans[-1]["version"], "weight_versions": spans}
        if self._extras is not None:
            meta |= self._extras.meta()
        if self.over:
            meta["e2e_latency"] = reply.finished - reply.created
        return meta


def _weight(result: Any) -> int:
    """Bytes in a result, which is made of builtins."""
    if isinstance(result, bytes):
        return len(result)
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, list) else ()
    return sum(_weight(part) for part in parts)


def usage(sequences: Iterable[Sequence], samples: int) -> Usage:
    """OpenAI's token counts; the prompt of ``samples`` neighbouring sequences counts once."""
    metas = [sequence.meta_info() for sequence in sequences]
    prompt = sum(meta["prompt_tokens"] for meta in metas[::samples])
    completion = sum(meta["completion_tokens"] for meta in metas)
    return token_usage(prompt, completion, cached=sum(meta["cached_tokens"] for meta in metas[::samples]))
