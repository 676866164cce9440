"""Code that only a test uses, or nobody, is found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vulture import Vulture
from vulture.core import Item

KINDS = {"function", "method", "property", "class", "attribute", "import", "unreachable_code", "variable"}
# Called or read by others: a library's protocol, a template, a debugger, the tests of an operation.
EXCEPTIONS = (
    "*_reference",  # what kernels are compared with
    "hook_calls",  # counted, so that a test sees that none is made while requests are served
    "begin_pass", "end_pass",  # called by name in ExpertWatch
    "__signature__", "__annotations__", "__call__", "extra_repr", "__getattr__", "render",
    "data_received", "to_asgi_response", "capture_signals", "disconnected", "should_exit",
    "normalizer", "pre_tokenizer", "post_processor", "decoder", "model_max_length", "disabled",
    "warn_if_padding_and_no_attention_mask",
    "_owner",  # keeps compiled code alive
    "max_mem", "log_errors",  # RE2's options
    "list_plugins", "inspect_plugin",  # typer's commands
    "typing", "sig", "intrinsic_name", "uint32s",  # numba's
    "memo", "argument", "null",  # arguments and attributes that a protocol of Python, Numba or LLVM prescribes
)  # fmt: skip
DECORATORS = ["@hookimpl", "@hookspec", "@route", "@get", "@post"]


def is_field(item: Item) -> bool:
    """Whether it is a field of a request or reply: tests/architecture/test_fields.py checks what requests' do."""
    path = str(item.filename)
    return item.typ == "variable" and (path.endswith(("schemas.py", "chat_messages.py")) or "/routes" in path)


def unused(paths: Iterable[Path]) -> list[str]:
    """What is defined below ``paths`` and used nowhere there, as "name (kind, file)"."""
    finder = Vulture(ignore_names=list(EXCEPTIONS), ignore_decorators=DECORATORS)
    finder.scavenge([str(path) for path in paths])
    found = [item for item in finder.get_unused_code() if item.typ in KINDS and not is_field(item)]
    return [f"{item.name} ({item.typ}, {item.filename})" for item in found]


def test_everything_is_used(repository: Path) -> None:
    assert unused(repository / name for name in ("core", "kernels", "plugins", "examples")) == []


def test_what_nobody_uses_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def used():\n    pass\n\n\ndef left_over():\n    used()\n")
    assert [found.split()[0] for found in unused([tmp_path])] == ["left_over"]
