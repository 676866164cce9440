"""Run compiled loops on torch's own OpenMP threads.

Two pools on the same cores fight: the workers of the one spin while those of the other wait for
a core. numba's ``omp`` threading layer loads the system's libgomp beside the one that torch
carries, so it *is* a second pool. Here a numba ``cfunc`` is handed to the ``GOMP_parallel`` that
torch itself is linked with: the same team of threads alternates between torch's operators and
ours, and a parallel region costs a few microseconds. Where torch has no such symbol (no OpenMP,
or another runtime) the loops run on the calling thread.

A task is a function of one record of arguments (addresses, sizes, strides, floats); each thread
finds its share with :func:`thread` and :func:`threads`.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Any, get_type_hints

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from . import objects

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _openmp() -> Any:
    """torch's extension module; a symbol looked up in it is searched in the libraries it links."""
    library = ctypes.CDLL(torch._C.__file__)
    try:
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        symbols = library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier
        return library if all(symbols) else None
    except AttributeError:
        return None


_library = _openmp()
_count = ctypes.CFUNCTYPE(ctypes.c_int)
_alone = _count(lambda: 0), _count(lambda: 1)  # without OpenMP: thread 0 of 1, which waits for nobody


def _external(symbol: str, function: Any) -> Any:
    """A function without arguments that compiled code calls by name: addresses differ from start to start."""
    llvm.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)

    def call(context: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            result = ir.IntType(32)
            return builder.call(get_or_insert_function(builder.module, ir.FunctionType(result, []), symbol), [])

        return types.int32(), generate

    return intrinsic(call)


thread = _external("trunkline_thread", _library.omp_get_thread_num if _library else _alone[0])
threads = _external("trunkline_threads", _library.omp_get_num_threads if _library else _alone[1])
barrier = _external("trunkline_barrier", _library.GOMP_barrier if _library else _alone[0])


def _claim(typing: Any, arguments: Any, count: Any) -> Any:
    """``claim(a, n)``: add ``n`` to the field ``claimed`` of a task's arguments, atomically; what it was before.

    A thread that a neighbour of this machine slows down claims less of the work.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        start = builder.bitcast(values[0], ir.IntType(8).as_pointer())
        field = builder.gep(start, [ir.IntType(64)(signature.args[0].offset("claimed"))])
        counter = builder.bitcast(field, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, values[1], "monotonic")

    return types.int64(arguments, types.int64), generate


claim = intrinsic(_claim)


class _Recorder(threading.local):
    """The recording that takes this thread's launches in place of running them, see :mod:`.recording`."""

    recording: Any = None


recorder = _Recorder()


class Task:
    """A compiled loop. ``body(arguments)`` runs once on every thread of the team."""

    def __init__(self, body: Callable[[Any], None], arguments: type, **options: Any) -> None:
        """Compile ``body`` for a record with the fields that the class ``arguments`` annotates as int or float.

        Takes 0.3 to 2 s, or milliseconds when an earlier start kept the code (:mod:`.objects`).
        """
        options = OPTIONS | options
        kinds = get_type_hints(arguments)
        self.fields = tuple(kinds)
        record = [(name, np.float64 if kind is float else np.int64) for name, kind in kinds.items()]
        identity = objects.fingerprint((body, record, options))
        self._owner, self.address = objects.load(identity) or self._compile(identity, body, record, options)
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        self._pack = struct.Struct("".join("d" if kind is float else "q" for kind in kinds.values())).pack
        self._in_order = itemgetter(*self.fields)

    @staticmethod
    def _compile(identity: str, body: Any, record: list[Any], options: dict[str, Any]) -> tuple[Any, int]:
        compiled = njit(**options)(body)

        def entry(address: Any) -> None:
            compiled(carray(address, 1)[0])

        pointer = types.CPointer(from_dtype(np.dtype(record)))
        function = cfunc(types.void(pointer), nopython=True)(entry)
        objects.store(identity, function)
        return function, int(function.address)

    def run(self, team: int, alone: bool = False, /, **arguments: float) -> None:
        """Run on at most ``team`` threads, see :func:`team_size`; returns when all are done.

        ``arguments``: a value for each field. ``alone``: the body is for one thread, whatever the size of the team.
        """
        if len(arguments) != len(self.fields):
            raise TypeError(f"the fields are {self.fields}, not {tuple(arguments)}")
        block = self._pack(*self._in_order(arguments))  # new each time, so that bodies may write to it (``claim``)
        if recorder.recording is not None:
            recorder.recording.take(self, block, alone)
        elif team > 1 and not alone and _library is not None:
            _library.GOMP_parallel(self.address, block, team, 0)
        else:
            self._alone(block)


def team_size(parallel: bool = True) -> int:
    """torch's number of threads, so that its team is reused, or 1 when the work is too small."""
    return torch.get_num_threads() if parallel and _library is not None else 1


def _pointer_to(element: Any) -> Any:
    """An intrinsic that turns an int64 address into a C pointer: ``p = floats(address); p[i] = x``.

    Bare pointers compile several times faster than arrays, and the vectoriser sees through them.
    """

    def cast(context: Any, address: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], target.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return intrinsic(cast)


float32s, float64s = map(_pointer_to, (types.float32, types.float64))
uint32s, uint16s = map(_pointer_to, (types.uint32, types.uint16))
int32s, int64s = map(_pointer_to, (types.int32, types.int64))
