"""Flags of SGLang's ``launch_server`` that have no setting here.

A command line written for SGLang should start the server, or fail with one sentence that gives the reason. Flags in
``IGNORED`` change no result: they are accepted, and logged. Flags in ``REFUSED`` ask for something that isn't
supported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from trunkline.core.errors import ConfigError

from .flags import Flag

log = logging.getLogger("trunkline")

GROUP = "sglang"


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag of SGLang. ``accepted``: the values that can be ignored, None = all."""

    names: tuple[str, ...]
    why: str
    switch: bool = False
    accepted: tuple[str, ...] | None = None

    @property
    def field(self) -> str:
        return self.names[0][2:].replace("-", "_")

    @property
    def flag(self) -> Flag:
        return Flag(GROUP, self.field, self.names, bool if self.switch else str, hidden=True)


IGNORED = (
    ForeignFlag(("--tp-size", "--tp", "--tensor-parallel-size"), "one device is used", accepted=("1",)),
    ForeignFlag(("--dp-size", "--dp", "--data-parallel-size"), "one engine is used", accepted=("1",)),
    ForeignFlag(("--page-size",), "the prefix cache has no pages: prefixes are shared token by token", accepted=("1",)),
    ForeignFlag(("--load-format",), "weights are read from safetensors", accepted=("auto", "safetensors")),
    ForeignFlag(("--json-model-override-args",), "config.json can't be overridden", accepted=("{}", "")),
    ForeignFlag(("--max-prefill-tokens",), "--chunked-prefill-size bounds a pass"),
    ForeignFlag(("--sampling-backend",), "there is one sampler"),
    ForeignFlag(("--schedule-conservativeness",), "running requests are retracted when memory runs out"),
    ForeignFlag(("--enable-memory-saver",), "memory can always be released", switch=True),
    ForeignFlag(("--enable-cache-report",), "replies always report cached tokens", switch=True),
    ForeignFlag(("--log-requests",), "each request is logged in one line, never with its text", switch=True),
)

REFUSED = (
    ForeignFlag(("--trust-remote-code",), "code that comes with models is never run", switch=True),
    ForeignFlag(
        ("--stream-output", "--incremental-streaming-output"), "each frame has the whole text so far", switch=True
    ),
    ForeignFlag(
        ("--allow-auto-truncate",),
        "prompts that are too long are refused; tasks that truncate have flags of their own (see --help)",
        switch=True,
    ),
    ForeignFlag(("--enable-custom-logit-processor",), "code from requests is never run; write a plugin", switch=True),
    ForeignFlag(("--completion-template",), "there are no completion templates; --chat-template takes a file"),
    ForeignFlag(("--expert-balancedness-report-mode",), "GET /expert_distribution reports balancedness"),
)


def flags() -> list[Flag]:
    """Hidden options for all of them."""
    return [foreign.flag for foreign in (*IGNORED, *REFUSED)]


def check_foreign_flags(given: dict[str, Any]) -> None:
    """Log the flags among ``given`` that are ignored; ConfigError for one that is refused."""
    for foreign in REFUSED:
        if given.get(foreign.field):
            raise ConfigError(f"{foreign.names[0]} isn't supported: {foreign.why}. Leave the flag out.")
    for foreign in IGNORED:
        value = given.get(foreign.field)
        if value is None:
            continue
        if foreign.accepted is not None and value not in foreign.accepted:
            allowed = " or ".join(repr(one) for one in foreign.accepted if one)
            raise ConfigError(f"{foreign.names[0]} {value} isn't supported: {foreign.why}; it can only be {allowed}.")
        log.info("%s is accepted and ignored: %s", foreign.names[0], foreign.why)
