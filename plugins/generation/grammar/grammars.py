"""``Grammars``: what the stage of the generation task calls for requests with a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from trunkline.core.types import Model, PartRow, Request
from trunkline.plugins.generation.hooks import CompiledGrammar

from .compiler import GrammarCompiler
from .state import GrammarState, MaskFiller, Masks


class Grammars:
    """Compiles the grammars of a model's requests, follows them, and masks logits."""

    def __init__(self, model: Model, compiler: GrammarCompiler) -> None:
        self._model = model
        self._compiler = compiler
        self._filler = MaskFiller(model.info.vocab_size)

    def compile(self, request: Request) -> Future[CompiledGrammar] | None:
        """Begin to compile the request's grammar, None if it has none. The Future is kept in ``request.state``."""
        if request.params.grammar is None:
            return None
        future = self._compiler.start(request.params.grammar)
        request.state = future
        return future

    def begin(self, request: Request) -> GrammarState | None:
        """The state after the request's output so far. RequestError if its grammar can't be compiled or followed.

        Waits for the compilation, unless :meth:`compile` was called and its Future is done.
        """
        grammar = request.params.grammar
        if grammar is None:
            return None
        future = request.state if isinstance(request.state, Future) else self._compiler.start(grammar)
        state = GrammarState(grammar, future.result(), lambda: self._compiler.forget(grammar))
        for token in request.output:
            state.accept(token)
        if state.failure is not None:
            raise state.failure
        return state

    def start_masks(self, rows: Sequence[PartRow]) -> Masks | None:
        """Begin with the masks of the sampled rows; None if no request of them has a grammar."""
        return self._filler.start(rows)

    def apply(self, masks: Masks | None, rows: torch.Tensor | None, logits: torch.Tensor) -> None:
        """Forbid tokens in the logits of the sampled rows, float32 ``[R, V]``. ``rows``: those of ``masks``, there."""
        if masks is not None:
            self._model.backend.mask_tokens(logits, rows, masks.wait(logits.device))

    def warm_up(self) -> None:
        """Load the tokenizer and run the kernel once: warm-up requests have no grammar."""
        self._compiler.warm_up()
        vocabulary, device = self._model.info.vocab_size, self._model.device
        masks = torch.full((1, (vocabulary + 31) // 32), -1, dtype=torch.int32, device=device)
        rows = torch.zeros(1, dtype=torch.int64, device=device)
        self._model.backend.mask_tokens(torch.zeros(1, vocabulary, device=device), rows, masks)
