"""torch's operations with results that don't depend on the batch, for modules that aren't ours (deterministic mode).

torch's vectorised loops compute the end of a thread's share of a tensor by other code than the rest, so the bits of an
exponential depend on its place in the batch. Sums, and products of matrices, are divided by the shape of the whole
tensor. Inside of a function that :func:`row_invariant` wraps, such operations are replaced by slower ones:

* elementwise functions run on slices of one length, so that no element is at the end of one;
* sums are added up in pairs, in an order that depends only on the length of the row;
* products with weights run on :mod:`trunkline.kernels.cpu.gemm`, which adds in the order of the inputs.

Operations that are exact, or only move numbers, stay torch's. All others raise: a model that calls one can't be served
in this mode.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .linear import OrderedLinear

Function = TypeVar("Function", bound=Callable[..., Any])

SLICE = 1 << 14  # numbers; torch computes fewer than 32,768 on one thread
ALIGNMENT = 64  # numbers: a multiple of what a vectorised loop of torch computes in one step

# Rounded correctly, or not rounded at all, so that the same numbers give the same result anywhere.
_EXACT = """
__and__ __bool__ __eq__ __float__ __format__ __ge__ __get__ __getitem__ __gt__ __hash__ __iadd__ __imul__ __index__
__int__ __invert__ __isub__ __itruediv__ __le__ __len__ __lt__ __mul__ __ne__ __or__ __radd__ __repr__ __rmul__ __rsub__
__rtruediv__ __set__ __setitem__
abs add add_ all amax amin any arange argmax argsort as_strided bfloat16 bool broadcast_to cat chunk clamp clone
contiguous copy_ cpu data_ptr detach dim div div_ dropout element_size embedding empty empty_like eq expand expand_as
eye fill_ flatten float full full_like gather ge get_device gt half index_copy_ index_put index_select is_complex
is_contiguous is_floating_point is_inference isfinite item le linspace logical_and logical_not logical_or long lt
masked_fill masked_fill_ max maximum min minimum movedim mul mul_ narrow ne neg new_empty new_full new_ones new_zeros
numel numpy ones ones_like pad permute reciprocal relu repeat repeat_interleave reshape roll select size sort split
split_with_sizes sqrt square squeeze stack storage_offset stride sub sub_ t to tolist topk transpose tril triu
true_divide type type_as unbind unflatten unsqueeze untyped_storage view view_as where zeros zeros_like
"""
_ELEMENTWISE = """
exp exp2 log log2 log1p expm1 sin cos tan tanh sigmoid silu gelu mish softplus erf leaky_relu hardswish relu6 elu rsqrt
"""
EXACT, ELEMENTWISE = frozenset(_EXACT.split()), frozenset(_ELEMENTWISE.split())


class _Thread(threading.local):
    """Whether this thread is inside of a wrapped function: replacing the replacements again would only take time."""

    inside = False


_thread = _Thread()


class NotRowInvariantError(RuntimeError):
    """A model calls an operation of torch whose results may depend on the batch."""


def row_invariant(function: Function) -> Function:
    """``function``, with torch's operations replaced. It raises NotRowInvariantError for unknown ones."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _thread.inside:
            return function(*args, **kwargs)
        _thread.inside = True
        try:
            with _MODE:
                return function(*args, **kwargs)
        finally:
            _thread.inside = False

    return cast(Function, wrapped)


class _RowInvariant(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in EXACT:
            return function(*args, **given)
        if (replacement := REPLACEMENTS.get(name)) is not None:
            return replacement(function, *args, **given)
        if all(_is_exact(each) for each in (*args, *given.values())):
            return function(*args, **given)
        raise NotRowInvariantError(f"torch's {name} may give other results in another batch")


def _is_exact(value: Any) -> bool:
    """Whether a value has no tensor of rounded numbers."""
    if isinstance(value, list | tuple):
        return all(_is_exact(each) for each in value)
    return not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex())


def elementwise(function: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``function(x, ...)`` of a function of single numbers, in slices of SLICE numbers. In-place ones aren't."""
    kwargs.pop("inplace", None)
    flat = x.reshape(-1)
    count = len(flat)
    out = torch.empty_like(flat)
    for first in range(0, count, SLICE):
        part = flat[first : first + SLICE]
        rest = -len(part) % ALIGNMENT
        padded = F.pad(part, (0, rest)) if rest else part
        out[first : first + SLICE] = function(padded, *args, **kwargs)[: len(part)]
    return out.view(x.shape)


def total(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The sum over one dimension: its first half plus its second half, and so on. Padded with zeros to a power of 2."""
    x = x.movedim(dim, 0)
    width = 1 << max(0, (len(x) - 1).bit_length())
    if width != len(x):
        x = torch.cat([x, x.new_zeros(width - len(x), *x.shape[1:])])
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x[0]


def _sum(function: Any, x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    if not x.is_floating_point():
        exact: torch.Tensor = function(x, dim, keepdim, dtype=dtype) if dim is not None else function(x, dtype=dtype)
        return exact
    dim = _one_dimension(dim, "sum")
    result = total(x.to(torch.float32 if x.dtype != torch.float64 else x.dtype), dim)
    result = result.to(dtype or x.dtype)
    return result.unsqueeze(dim if dim >= 0 else dim + x.ndim) if keepdim else result


def _mean(_: Any, x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    dim = _one_dimension(dim, "mean")
    wide = x.to(torch.float32 if x.dtype != torch.float64 else x.dtype)
    result: torch.Tensor = (total(wide, dim) / x.shape[dim]).to(dtype or x.dtype)
    return result.unsqueeze(dim if dim >= 0 else dim + x.ndim) if keepdim else result


def _one_dimension(dim: Any, name: str) -> int:
    if isinstance(dim, list | tuple) and len(dim) == 1:
        (dim,) = dim
    if not isinstance(dim, int):
        raise NotRowInvariantError(f"torch's {name} over {dim} adds numbers of different rows")
    return dim


def _softmax(_: Any, x: torch.Tensor, dim: int = -1, *__: Any, dtype: Any = None, **___: Any) -> torch.Tensor:
    wide = x.to(dtype or x.dtype).float()
    weights = elementwise(torch.exp, wide - wide.amax(dim, keepdim=True))
    return (weights / total(weights, dim).unsqueeze(dim)).to(dtype or x.dtype)


def _logsumexp(_: Any, x: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    dim = _one_dimension(dim, "logsumexp")
    top = x.amax(dim, keepdim=True)
    mass = total(elementwise(torch.exp, x - top), dim).unsqueeze(dim)
    result = elementwise(torch.log, mass) + top
    return result if keepdim else result.squeeze(dim)


def _normalize(_: Any, x: torch.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **__: Any) -> torch.Tensor:
    if p != 2:
        raise NotRowInvariantError("torch's normalize is known for p = 2 only")
    return x / total(x * x, dim).sqrt().clamp(min=eps).unsqueeze(dim)


def _layer_norm(
    _: Any, x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    if len(shape) != 1:
        raise NotRowInvariantError("torch's layer_norm is known for one dimension only")
    wide = x.float()
    centred = wide - (total(wide) / x.shape[-1]).unsqueeze(-1)
    variance = total(centred * centred) / x.shape[-1]
    return _affine(centred / (variance + eps).sqrt().unsqueeze(-1), weight, bias).to(x.dtype)


def _rms_norm(_: Any, x: torch.Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> torch.Tensor:
    if len(shape) != 1:
        raise NotRowInvariantError("torch's rms_norm is known for one dimension only")
    wide = x.float()
    square = total(wide * wide) / x.shape[-1] + (torch.finfo(x.dtype).eps if eps is None else eps)
    return _affine(wide / square.sqrt().unsqueeze(-1), weight, None).to(x.dtype)


def _affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    x = x if weight is None else x * weight.float()
    return x if bias is None else x + bias.float()


def _pow(function: Any, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, torch.Tensor):  # frequencies of rotary embeddings: base ** exponents
        return elementwise(lambda e: function(x, e), exponent)
    return x * x if exponent == 2 else elementwise(function, x, exponent)


def _scatter(function: Any, *args: Any, **kwargs: Any) -> Any:
    if "reduce" in kwargs or len(args) > 4:
        raise NotRowInvariantError("torch's scatter with a reduction adds in no particular order")
    return function(*args, **kwargs)


def _linear(_: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    sums = packed(weight).forward(x)
    return (sums if bias is None else sums + bias.float()).to(x.dtype)


def _addmm(_: Any, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _linear(None, x, weight.t(), bias)


def _matmul(_: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x @ y``: an outer product, or the product with a weight [K, N] or one weight per batch entry [B, K, N]."""
    if x.shape[-1] == 1 and x.ndim == y.ndim:
        return x * y
    if _is_weight(y):
        if y.ndim == 2:
            return _linear(None, x, y.t())
        if y.ndim == 3 and x.ndim == 3 and len(x) == len(y):
            return torch.stack([_linear(None, rows, one.t()) for rows, one in zip(x, y, strict=True)])
    raise NotRowInvariantError("a product of two matrices neither of which is a weight depends on the batch")


def _is_weight(x: torch.Tensor) -> bool:
    """Whether it is a parameter or a view of one; these aren't changed while a model is served."""
    return isinstance(x, torch.nn.Parameter) or isinstance(x._base, torch.nn.Parameter)


_packed: dict[tuple[Any, ...], tuple[Any, OrderedLinear]] = {}


def packed(weight: torch.Tensor) -> OrderedLinear:
    """The linear layer of a matrix [N, K], with float32 results. That of a model's weight is kept, a second copy."""
    if not _is_weight(weight):
        return OrderedLinear(weight.detach().contiguous(), float32_out=True)
    storage = weight.untyped_storage()
    key = storage._cdata, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype
    found = _packed.get(key)  # the reference in the entry keeps the address of the storage from being used again
    if found is None:
        for other, (reference, _) in list(_packed.items()):
            if reference.expired():
                del _packed[other]
        held = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        found = _packed[key] = held, OrderedLinear(weight.detach().contiguous(), float32_out=True)
    return found[1]


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "sum": _sum,
    "mean": _mean,
    "softmax": _softmax,
    "logsumexp": _logsumexp,
    "normalize": _normalize,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scatter": _scatter,
    "scatter_": _scatter,
    "pow": _pow,
    "__pow__": _pow,
    "__rpow__": lambda function, x, base: _pow(torch.pow, base, x),
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "bmm": _matmul,
}
_MODE = _RowInvariant()
