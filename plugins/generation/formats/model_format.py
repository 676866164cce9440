"""The format of one served model's replies, and what a request needs of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from trunkline.core.errors import ConfigError, RequestError
from trunkline.core.server.api import takes_tools, template_text
from trunkline.core.types import EngineClient, Tokenizer

from .choose import AUTO, ReplyFormat, reply_format
from .grammars import forced_answer, forced_calls
from .regions import Regions
from .reply_parser import Piece, ReplyParser
from .tool_prompt import as_text

log = logging.getLogger("trunkline.generation")

IN_THREAD = 1 << 20  # size that makes the engine run a function in a thread


class ModelFormat:
    """The formats of a model; its response templates are loaded at their first use."""

    def __init__(self, tokenizer: Tokenizer, tool: str, reasoning: str) -> None:
        """``tool`` and ``reasoning``: values of --tool-call-parser and --reasoning-parser."""
        self.form = reply_format(tokenizer, template_text(tokenizer), tool, reasoning)
        added: Any = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {str(token.content): id_ for id_, token in added.items() if token.special}
        self.regions = cache(self._load)
        self.kept = cache(self._kept)
        self._failure = ""
        self._takes_tools = takes_tools(tokenizer)
        self._chosen = tool != AUTO

    def _load(self, tools: bool, reasoning: bool) -> Regions | None:
        """The template for a request that has tools or wants reasoning separated; None = its replies are content."""
        template = self.form.template(tools=tools, reasoning=reasoning)
        try:
            return None if template is None else Regions(template)
        except ConfigError as error:
            log.warning("replies are sent as they are: %s", error)
            self._failure = str(error)
            return None

    def chat(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], Sequence[dict[str, Any]]]:
        """The messages and tools for the chat template.

        If it takes no tools, and --tool-call-parser has chosen a format that can be explained, tools, calls and their
        results are part of the messages' text. RequestError for tools that can't reach the model.
        """
        if self._takes_tools:
            return messages, tools
        if self._chosen and self.form.tool is not None and self.form.tool.explained:
            return as_text(messages, tools, self.form.tool), ()
        if tools:
            raise RequestError(
                "The model's chat template takes no tools; leave them out, or start the server with --tool-call-parser "
                "hermes, which explains them in the system message, or with a template that takes them "
                "(--chat-template FILE).",
                param="tools",
            )
        return messages, tools

    def check_tools(self) -> None:
        """RequestError if the model's tool calls can't be read."""
        if self.form.calls is None:
            raise RequestError(
                "The format of this model's tool calls isn't known, so that calls can't be read; leave tools out, or "
                "start the server with --tool-call-parser NAME.",
                param="tools",
            )
        if self.regions(True, True) is None:
            raise RequestError(f"Tool calls can't be read. {self._failure}", param="tools")

    def _kept(self, regions: Regions) -> frozenset[int]:
        """Ids of the special tokens that are markers of the format."""
        text = json.dumps(regions.template, ensure_ascii=False).replace("\\", "")
        return frozenset(id_ for token, id_ in self.special.items() if token in text)


class ReplyReader:
    """How the replies to one request are split. Made off the event loop for long prompts.

    ``schemas``: the parameters of the tools that may be called, by name; empty: none. ``fields``: those of the request
    that have them, by name. ``many``: calls after the first are kept. ``kept``: ids of special tokens that must be in
    the text.
    """

    def __init__(
        self,
        model: ModelFormat,
        regions: Regions,
        prompt: str,
        schemas: Mapping[str, Any],
        fields: Mapping[str, str],
        *,
        many: bool,
    ) -> None:
        self.many = many
        self.kept = model.kept(regions)
        self._model = model
        self._regions = regions
        self._prefix = regions.after_anchor(prompt)
        self._schemas = schemas
        self._fields = fields

    @property
    def form(self) -> ReplyFormat:
        """The model's format."""
        return self._model.form

    def parser(self) -> ReplyParser:
        """A parser for one reply."""
        return ReplyParser(self._model.form, self._regions, self._prefix, self._schemas)

    def in_reasoning(self) -> bool:
        """Whether the prompt ends inside the reasoning."""
        return self.parser().in_reasoning

    def grammar(self, answer: str | None) -> str:
        """A grammar for calls of the tools, or for JSON that matches the JSON Schema ``answer``."""
        special, opened = self._model.special, self.in_reasoning()
        if answer is None or self._schemas:
            options: dict[str, Any] = {"fields": self._fields, "many": self.many, "in_reasoning": opened}
            return forced_calls(self.form, self._schemas, special, answer=answer, **options)
        return forced_answer(answer, self.form, special, in_reasoning=opened)


async def read_pieces(engine: EngineClient, parser: ReplyParser, text: str, *, ended: bool, slow: bool) -> list[Piece]:
    """The pieces that are complete with the next part of a reply; off the event loop where that may take long.

    ``slow``: the patterns are a checkpoint's own.
    """

    def read() -> list[Piece]:
        pieces = parser.feed(text)
        return [*pieces, *parser.finish()] if ended else pieces

    pieces: list[Piece] = await engine.off_loop(read, size=IN_THREAD if slow else parser.cost(text))
    return pieces
