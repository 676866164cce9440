"""Run compiled loops on torch's own OpenMP threads.

Two thread pools on the same cores slow each other down: idle threads of one pool spin while those of
the other wait for a core. numba's ``omp`` threading layer would be such a second pool, because it loads
the system's libgomp beside the one that torch brings. So we pass a numba ``cfunc`` to the
``GOMP_parallel`` that torch itself is linked with. torch's operators and our kernels then use the same
team of threads, and a parallel region costs a few microseconds. Where torch has no such symbol (no
OpenMP, or another runtime), kernels run on the calling thread.

A :class:`Kernel` is a function of one record of arguments (addresses, sizes, strides, floats). Each
thread of the team runs it, and finds its share of the work with :func:`thread` and :func:`threads`.
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
    """torch's extension module with the symbols of its OpenMP runtime, or None if it lacks one of them.

    A symbol that is looked up in it is also searched in the libraries that it is linked with.
    """
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
_serial = _count(lambda: 0), _count(lambda: 1)  # without OpenMP: thread 0 of 1, whose barrier returns at once


def _external(symbol: str, function: Any) -> Any:
    """A function without arguments for compiled code, which calls it by name.

    Its address differs between processes, but code may be loaded from disk (:mod:`.objects`).
    """
    llvm.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)

    def call(context: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            result = ir.IntType(32)
            return builder.call(get_or_insert_function(builder.module, ir.FunctionType(result, []), symbol), [])

        return types.int32(), generate

    return intrinsic(call)


thread = _external("trunkline_thread", _library.omp_get_thread_num if _library else _serial[0])
threads = _external("trunkline_threads", _library.omp_get_num_threads if _library else _serial[1])
barrier = _external("trunkline_barrier", _library.GOMP_barrier if _library else _serial[0])


def _call(typing: Any, function: Any, argument: Any) -> Any:
    """``call(function, argument)``: call the function at an address, with another address as its argument."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = ir.FunctionType(ir.VoidType(), [ir.IntType(64)]).as_pointer()
        builder.call(builder.inttoptr(values[0], pointer), [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _call_alone(typing: Any, function: Any, argument: Any) -> Any:
    """``call_alone(function, argument)``: as ``call``, by a team of only this thread, which is then thread 0 of 1."""
    word, i32 = ir.IntType(64), ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [word, word, i32, i32])
        parallel = get_or_insert_function(builder.module, kind, "trunkline_parallel")
        builder.call(parallel, [*values, i32(1), i32(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


if _library:
    llvm.add_symbol("trunkline_parallel", ctypes.cast(_library.GOMP_parallel, ctypes.c_void_p).value)
call = intrinsic(_call)
call_alone = intrinsic(_call_alone) if _library else call


def _claim(typing: Any, arguments: Any, count: Any) -> Any:
    """``claim(a, n)``: atomically add ``n`` to the field ``claimed`` of a kernel's arguments; returns its old value.

    Threads claim units of work one after another (dynamic scheduling). So a thread whose core is shared
    with other processes does less of the work, and the others don't wait for it.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        start = builder.bitcast(values[0], ir.IntType(8).as_pointer())
        field = builder.gep(start, [ir.IntType(64)(signature.args[0].offset("claimed"))])
        counter = builder.bitcast(field, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, values[1], "monotonic")

    return types.int64(arguments, types.int64), generate


claim = intrinsic(_claim)


class _Recorder(threading.local):
    """What stores this thread's launches instead of running them, see :mod:`.launches`; None if nothing does.

    Its attribute ``serial`` is whether a single thread will run them, so that they need scratch memory for one only.
    """

    recording: Any = None


recorder = _Recorder()


class Kernel:
    """A compiled function, ``body(arguments)``, that runs once on every thread of the team."""

    def __init__(self, body: Callable[[Any], None], arguments: type, **options: Any) -> None:
        """Compile ``body`` for a record with the fields that the class ``arguments`` annotates as int or float.

        ``options`` are numba's. Takes 0.3 to 2 s, or milliseconds when an earlier process stored the code
        (:mod:`.objects`).
        """
        options = OPTIONS | options
        kinds = get_type_hints(arguments)
        self.fields = tuple(kinds)
        record = [(name, np.float64 if kind is float else np.int64) for name, kind in kinds.items()]
        identity = objects.fingerprint((body, record, options))
        self._owner, self.address = objects.load(identity) or self._compile(identity, body, record, options)
        self._run_serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
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

    def run(self, team: int, single_thread: bool = False, /, **arguments: float) -> None:
        """Run on at most ``team`` threads, see :func:`team_size`; returns when all are done.

        ``arguments``: a value for each field. ``single_thread``: only one thread may run the body, also in a
        recording, which is replayed by the whole team. TypeError for missing or unknown fields.
        """
        if len(arguments) != len(self.fields):
            raise TypeError(f"the fields are {self.fields}, not {tuple(arguments)}")
        block = self._pack(*self._in_order(arguments))  # a new record for each launch: ``claim`` writes to it
        if recorder.recording is not None:
            recorder.recording.record(self, block, single_thread)
        elif team > 1 and not single_thread and _library is not None:
            _library.GOMP_parallel(self.address, block, team, 0)
        else:
            self._run_serial(block)


def team_size(parallel: bool = True) -> int:
    """torch's number of threads, so that its team is reused; 1 if not ``parallel``, without OpenMP, and while launches
    are recorded that a single thread will run."""
    alone = recorder.recording is not None and recorder.recording.serial
    return torch.get_num_threads() if parallel and _library is not None and not alone else 1


def _pointer_to(element: Any) -> Any:
    """An intrinsic that casts an int64 address to a C pointer: ``p = float32s(address); p[i] = x``.

    Pointers compile several times faster than numba's arrays, and LLVM vectorises loops over them.
    """

    def cast(context: Any, address: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], target.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return intrinsic(cast)


float32s, float64s = map(_pointer_to, (types.float32, types.float64))
uint16s = _pointer_to(types.uint16)
int8s, int16s, int32s, int64s = map(_pointer_to, (types.int8, types.int16, types.int32, types.int64))
