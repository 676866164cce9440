"""A cache of compiled kernels on disk, as object files, so that only the first start compiles.

numba's own cache can't be used, because it unpickles. This one stores the object file that LLVM emits,
after its SHA-256 digest, in a folder that only its owner can access. A file's name is a hash of
everything that the code depends on: the sources of all kernels, the constants that the kernel was
compiled with, numba, LLVM and the processor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from trunkline.kernels import compiled

logger = logging.getLogger(__name__)
_DIGEST = 32  # bytes of a SHA-256 digest


def fingerprint(value: Any) -> str:
    """What compiled code depends on besides the sources of all kernels: names, constants and closures, recursively.

    "" for values whose meaning is unknown here; such a kernel isn't cached.
    """
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return _all([fingerprint(x) for x in value])
    if isinstance(value, dict):
        return fingerprint([(key, value[key]) for key in sorted(value)])
    if isinstance(value, (set, frozenset)):
        return fingerprint(sorted(value))
    if isinstance(value, type):
        return value.__qualname__
    inner = getattr(value, "py_func", None) or getattr(value, "_defn", None) or value  # dispatcher, intrinsic
    code = getattr(inner, "__code__", None)
    if code is None:
        return ""
    cells = [fingerprint(cell.cell_contents) for cell in inner.__closure__ or ()]
    return _all([inner.__module__, inner.__qualname__, str(code.co_firstlineno), *cells])


def _all(parts: list[str]) -> str:
    return "(" + ",".join(parts) + ")" if all(parts) else ""


def load(identity: str) -> tuple[Any, int] | None:
    """The code cached for ``identity`` (a :func:`fingerprint`): its owner, which must stay alive, and its address.

    None when there is none, or when it can't be used.
    """
    path = _path(identity)
    if path is None or not path.is_file():
        return None
    data = path.read_bytes()
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        logger.warning("a cached kernel is damaged and is compiled again: %s", path)
        return None
    header, _, code = content.partition(b"\n")
    name, symbols = json.loads(header)
    rtsys.initialize(cpu_target.target_context)  # registers the symbols of numba's runtime
    if not all(llvm.address_of_symbol(symbol) for symbol in symbols):
        return None  # LLVM would leave the call at address 0
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)  # takes ownership of ``machine``
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, int(engine.get_function_address(name))


def store(identity: str, function: Any) -> None:
    """Cache a compiled numba ``cfunc`` for ``identity``; a full or read-only disk only causes a warning."""
    path = _path(identity)
    if path is None:
        return
    library = function._library
    module = library._final_module
    outside = [x.name for x in (*module.functions, *module.global_variables) if x.is_declaration]
    header = json.dumps([function._wrapper_name, [x for x in outside if not x.startswith("llvm.")]])
    content = header.encode() + b"\n" + library.codegen._tm.emit_object(module)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(hashlib.sha256(content).digest() + content)
        os.replace(partial.name, path)
    except OSError as error:
        logger.warning("a compiled kernel can't be cached: %s", error)


def _path(identity: str) -> Path | None:
    folder = compiled.folder()
    if not identity or folder is None:
        return None
    name = hashlib.sha256(f"{_environment()}\n{identity}".encode()).hexdigest()
    return folder / f"{name[:32]}.o"


@cache
def _environment() -> str:
    """Sources of all kernels, versions of the compilers, the processor's name and features."""
    sources = hashlib.sha256()
    for source in _sources():
        sources.update(source.read_bytes())
    processor = cpu_target.target_context.codegen().magic_tuple()
    return repr((sources.hexdigest(), sys.version, numba.__version__, llvmlite.__version__, processor))


def _sources() -> list[Path]:
    """Every Python file below ``kernels/``, since a kernel may use functions of any of them."""
    return sorted(Path(__file__).parents[1].rglob("*.py"))
