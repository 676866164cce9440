"""``Grammars``: what the stage of the generation task calls for requests with a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakValueDictionary

import torch

from trunkline.core.types import Model, PartRow, Request

from .compiler import GrammarCompiler
from .masks import MaskFiller, Masks
from .state import GrammarState, MaskTime


class Grammars:
    """Compiles the grammars of a model's requests, follows them, and masks logits."""

    def __init__(self, model: Model, compiler: GrammarCompiler) -> None:
        self._model = model
        self._compiler = compiler
        self._filler = MaskFiller(model.info.vocab_size)
        self._spent: WeakValueDictionary[str, MaskTime] = WeakValueDictionary()  # by ``group``
        compiler.open()

    def compile(self, request: Request) -> Future[Any] | None:
        """Begin to compile the request's grammar, None if it has none. The Future is kept in ``request.state``."""
        if request.params.grammar is None:
            return None
        future = self._compiler.start(request.params.grammar)
        request.state = future
        return future

    def begin(self, request: Request) -> GrammarState | None:
        """The state after the request's output so far. RequestError if its grammar can't be compiled.

        After :meth:`compile`, when its Future is done. Or for a request of a former stage, whose grammar may have to be
        compiled again: it is postponed until then.
        """
        grammar = request.params.grammar
        if grammar is None:
            return None
        kept = request.state if isinstance(request.state, Future) else self._compiler.start(grammar)
        group = request.params.group
        spent = self._spent.setdefault(group, MaskTime()) if group else MaskTime()
        return GrammarState(grammar, kept, lambda used: self._compiler.renew(grammar, used), spent, request.output)

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

    def close(self) -> None:
        """End what runs in threads."""
        self._filler.close()
        self._compiler.close()
