"""Stands in for the few modules of ``sglang.srt``, SGLang's server, that its clients import; import this first.

The wheel is installed without its dependencies, and the real modules need CUDA packages at import. Everything else of
``sglang`` is the wheel's own, ``sglang.srt.environ`` included. The two functions with a body are on the clients'
path and do what their names say.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def _stub(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []  # a package, so that modules below it can be stubs, too
    vars(module).update(members)
    sys.modules[name] = module


def _never(*_: object, **__: object) -> None:
    raise NotImplementedError("a stub of sglang.srt was called; the clients under test should not need it")


def _resolve_base_url(base_url: str | None, host: str, port: int) -> str:
    return base_url or f"http://{host}:{port}"


_stub("sglang.srt.utils", kill_process_tree=_never)
_stub("sglang.srt.utils.hf_transformers_patches", apply_all=lambda: None)
_stub("sglang.srt.utils.network", resolve_base_url=_resolve_base_url, resolve_host_port=_never)
_stub("sglang.srt.disaggregation")
_stub("sglang.srt.disaggregation.utils", FAKE_BOOTSTRAP_HOST="")
