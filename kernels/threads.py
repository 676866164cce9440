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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _openmp() -> Any:
    """torch's extension module; a symbol looked up in it is searched in the libraries it links."""
    library = ctypes.CDLL(torch._C.__file__)
    try:
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            getattr(library, name).argtypes = []
            getattr(library, name).restype = ctypes.c_int
    except AttributeError:
        return None
    return library


_library = _openmp()
if _library is None:
    thread = njit(**OPTIONS)(lambda: 0)
    threads = njit(**OPTIONS)(lambda: 1)
else:
    thread = _library.omp_get_thread_num
    threads = _library.omp_get_num_threads


class Task:
    """A compiled loop. ``body(arguments)`` runs once on every thread of the team."""

    def __init__(self, body: Callable[[Any], None], arguments: Any, **options: Any) -> None:
        """Compile ``body`` for a record: ``arguments`` is a numpy dtype of int64 and float64 fields.

        Takes 0.3 to 2 s; nothing is kept on disk, because numba's cache unpickles.
        """
        record = from_dtype(np.dtype(arguments))
        compiled = njit(**(OPTIONS | options))(body)

        def entry(address: Any) -> None:
            compiled(carray(address, 1)[0])

        self._entry = cfunc(types.void(types.CPointer(record)), nopython=True)(entry)  # owns the code
        self._address: int = self._entry.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)
        kinds = [np.dtype(arguments)[i].kind for i in range(len(np.dtype(arguments)))]
        self._pack = struct.Struct("".join("q" if kind == "i" else "d" for kind in kinds)).pack

    def run(self, arguments: Sequence[float], team: int) -> None:
        """Run on at most ``team`` threads, see :func:`team_size`; returns when all are done."""
        block = self._pack(*arguments)
        if team > 1 and _library is not None:
            _library.GOMP_parallel(self._address, block, team, 0)
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


float32s, uint32s, uint16s = map(_pointer_to, (types.float32, types.uint32, types.uint16))
int32s, int64s = map(_pointer_to, (types.int32, types.int64))
