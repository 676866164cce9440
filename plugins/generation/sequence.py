"""One generated sequence as its client sees it: the reply's tokens as text, and its meta_info."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Usage, token_usage
from trunkline.core.types import Reply, ServedModel, Tokenizer
from trunkline.plugins.generation.sampling.params import Sampling
from trunkline.plugins.generation.text.shown import ShownText


class Sequence:
    """Follows a :class:`Reply`. ``text`` only ever grows, and never shows a stop string or part of one."""

    def __init__(
        self, reply: Reply, prompt: list[int], sampling: Sampling, served: ServedModel, tokenizer: Tokenizer | None
    ) -> None:
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

    def refresh(self) -> None:
        """Bring ``text`` up to date with the reply."""
        if self._shown is None or self._over:
            return
        matched = (self.finish or {}).get("matched")
        end = len(self.reply.tokens)
        if self._trim and isinstance(matched, int):
            end -= 1  # the stop token itself is not text
        self._shown.push(self.reply.tokens[self._taken : end])
        self._taken = end
        self._over = self.over
        if self._over:
            # Only what was held back can be cut off: expressions and conditions end a text and stay in it.
            self.text = self._shown.finish(matched if matched in self._stops else None)
        else:
            self.text = self._shown.so_far()

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
        if self.over:
            meta["e2e_latency"] = reply.finished - reply.created
        return meta


def usage(sequences: Iterable[Sequence], samples: int) -> Usage:
    """OpenAI's token counts; the prompt of ``samples`` neighbouring sequences counts once."""
    metas = [sequence.meta_info() for sequence in sequences]
    prompt = sum(meta["prompt_tokens"] for meta in metas[::samples])
    completion = sum(meta["completion_tokens"] for meta in metas)
    return token_usage(prompt, completion, cached=sum(meta["cached_tokens"] for meta in metas[::samples]))
