"""Installs the checks into Triton's interpreter for the time of a ``with`` statement."""

from __future__ import annotations

import inspect
import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import TensorHandle

from .builder import CheckedBuilder, Checks, Launch, check_arithmetic
from .claims import CLAIMS
from .errors import KernelBug
from .loops import NAME, REWRITTEN, LoopTransformer, loop
from .memory import LaunchMemory
from .poison import require
from .races import AccessLog
from .reductions import CheckedReduce, CheckedScan

SEED = "TRUNKLINE_PROGRAM_ORDER_SEED"  # environment variable: repeats a failure
Order = Literal["random", "forward", "backward"]


class _Nothing:
    """What upstream restores after a launch: the language stays patched until the checks are removed."""

    def restore(self) -> None: ...


class Session:
    """One installation of the checks.

    ``last``: how many programs of each launch run, the last ones in launch order; None for all. For launches over
    tensors of many gigabytes, whose last programs have the largest offsets.
    """

    def __init__(self, checks: Checks, order: Order, seed: int, allowed: tuple[torch.Tensor, ...]) -> None:
        self.checks, self.order, self.seed, self.allowed = checks, order, seed, allowed
        self.launches = 0
        self.last: int | None = None
        self._random = random.Random(seed)

    def programs(self, grid: tuple[int, int, int]) -> list[tuple[int, tuple[int, int, int]]]:
        """The programs of a launch, each with its number, in the order in which they run."""
        count = math.prod(grid)
        numbers = range(0 if self.last is None else max(0, count - self.last), count)
        programs = [
            (number, (number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2]))
            for number in numbers
        ]
        if self.order == "random":
            self._random.shuffle(programs)
        return programs[::-1] if self.order == "backward" else programs


class CheckedExecutor(upstream.GridExecutor):  # type: ignore[misc]
    """Runs the programs of one launch. ``session`` is set while the checks are installed."""

    session: Session

    def __call__(self, *arguments: Any, **named: Any) -> None:
        spec = inspect.getfullargspec(self.fn)
        known = {name: value for name, value in named.items() if name in spec.args or name in spec.kwonlyargs}
        for hook in self.pre_run_hooks:
            hook(*arguments, **known)
        bound = inspect.getcallargs(self.fn, *arguments, **known)
        session, builder = self.session, upstream.interpreter_builder
        session.launches += 1
        memory = LaunchMemory(session.checks.bounds, session.allowed)
        launch = Launch(memory, AccessLog() if session.checks.races else None)
        handles = {
            name: value if name in self.constexprs else _convert(name, value, memory) for name, value in bound.items()
        }
        sizes = self.grid(handles) if callable(self.grid) else self.grid
        grid = (*map(int, sizes), 1, 1)[:3]
        builder.set_grid_dim(*grid)
        builder.launch = launch
        index = (0, 0, 0)
        try:
            # A GPU warns of nothing, while pytest makes errors of numpy's warnings.
            with np.errstate(all="ignore"), warnings.catch_warnings(category=RuntimeWarning, action="ignore"):
                for launch.program, index in session.programs(grid):
                    builder.set_grid_idx(*index)
                    self.fn(**handles)
            if launch.log is not None:
                launch.log.check(memory.locate)
        except Exception as exc:
            bug = _bug_in(exc)
            where = f"in {self.fn.__name__}, grid {grid}, last program {launch.program} {index}; {SEED}={session.seed}"
            (bug or exc).add_note(where)
            if bug is not None:
                raise bug from None
            raise
        finally:
            builder.launch = None


def _bug_in(exc: BaseException | None) -> KernelBug | None:
    """The KernelBug that upstream wrapped in other exceptions, one for each device function."""
    while exc is not None and not isinstance(exc, KernelBug):
        exc = exc.__cause__
    return exc


def _convert(name: str, value: Any, memory: LaunchMemory) -> Any:
    """A kernel's argument as the interpreter takes it; tensors become pointers with a region."""
    if isinstance(value, upstream.TensorDescriptor):
        # Upstream converts the parts of a descriptor by its own function, the base among them.
        with _replaced(upstream, "_implicit_cvt", lambda part: _convert(name, part, memory)):
            return _UPSTREAM_CONVERT(value)
    if isinstance(value, tuple):
        return upstream._tuple_create(value, [_convert(f"{name}[{i}]", part, memory) for i, part in enumerate(value)])
    if not hasattr(value, "data_ptr"):
        return _UPSTREAM_CONVERT(value)
    kind = tl.str_to_ty(upstream.triton.runtime.jit.mangle_type(value), None)
    return tl.tensor(TensorHandle(np.array([memory.add(name, value)], np.uint64), kind), kind)


_UPSTREAM_CONVERT = upstream._implicit_cvt
_MISSING = object()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _truth(tensor: Any) -> bool:
    if upstream.interpreter_builder.given_other is None:
        require(tensor.handle, "a branch depends on")
    return bool(tensor.handle.data) if tensor.handle.data.size == 1 else True


def _index(tensor: Any) -> int:
    require(tensor.handle, "a loop bound depends on")
    return int(tensor.handle.data.squeeze())


def _transposed(tensor: Any) -> Any:
    axes = [*range(len(tensor.shape) - 2), len(tensor.shape) - 1, len(tensor.shape) - 2]
    return upstream.interpreter_semantic.permute(tensor, axes)


class _Load:
    """Upstream's ``load``, which tests a scalar ``other`` for its value instead of for None: remember its presence."""

    def __init__(self) -> None:
        self._load = upstream.interpreter_semantic.load

    def __call__(self, pointer: Any, mask: Any, other: Any, *more: Any, **named: Any) -> Any:
        with _replaced(upstream.interpreter_builder, "given_other", other is not None):
            return self._load(pointer, mask, other, *more, **named)


class _Namespace:
    """Upstream patches the modules that a kernel's globals name."""

    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


@contextmanager
def installed(session: Session) -> Iterator[None]:
    """Patch the interpreter and ``triton.language`` once, instead of anew for every launch as upstream does."""
    builder, semantic = upstream.interpreter_builder, upstream.interpreter_semantic
    if isinstance(builder, CheckedBuilder):
        raise RuntimeError("the checked interpreter is installed already")
    scope = upstream._patch_lang(_Namespace)
    options = upstream.InterpreterOptions(debug=True, sanitize_overflow=session.checks.overflow)
    with ExitStack() as stack:
        stack.callback(scope.restore)
        for language in (tl, tl.core):
            for name, claim in CLAIMS.items():
                scope.set_attr(language, name, claim)
        scope.set_attr(tl, "range", loop)
        for name, value in (("__bool__", _truth), ("__index__", _index), ("T", property(_transposed))):
            scope.set_attr(tl.tensor, name, value)
        stack.callback(setattr, builder, "__class__", type(builder))
        builder.__class__ = CheckedBuilder
        replacements = [
            (builder, "checks", session.checks),
            (builder, "launch", None),
            (builder, "options", options),
            (semantic, "binary_op_sanitize_overflow_impl", check_arithmetic if session.checks.overflow else _ignore),
            (semantic, "load", _Load()),
            (CheckedExecutor, "session", session),
            (upstream, "GridExecutor", CheckedExecutor),
            (upstream, "ReduceOps", CheckedReduce),
            (upstream, "ScanOps", CheckedScan),
            (upstream, NAME, loop),
            (upstream.FunctionRewriter, "ast_transformer", LoopTransformer()),
            (upstream.InterpretedFunction, "rewritten_fn", REWRITTEN),
            (upstream, "_patch_lang", lambda _: _Nothing()),
        ]
        for owner, name, value in replacements:
            stack.enter_context(_replaced(owner, name, value))
        yield


def _ignore(*_: Any) -> None: ...


def order_seed() -> int:
    """The seed of the environment, or a new one."""
    return int(os.environ.get(SEED) or random.SystemRandom().randrange(10**6))
