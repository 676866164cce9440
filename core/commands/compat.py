"""Flags of SGLang's ``launch_server`` that have no setting here.

A command line written for SGLang should start, or say in one sentence why it can't. Flags in
``IGNORED`` change no result and are accepted with a log line; flags in ``REFUSED`` ask for
something that this version doesn't do.
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
class Foreign:
    """A flag that is known but not ours. ``accepted``: the values that may be ignored, None = all."""

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
    Foreign(("--tp-size", "--tp", "--tensor-parallel-size"), "one device is used", accepted=("1",)),
    Foreign(("--dp-size", "--dp", "--data-parallel-size"), "one engine is used", accepted=("1",)),
    Foreign(("--device",), "models are computed on the CPU", accepted=("auto", "cpu")),
    Foreign(("--page-size",), "the cache is shared token by token", accepted=("1",)),
    Foreign(("--load-format",), "weights are read from safetensors", accepted=("auto", "safetensors")),
    Foreign(("--json-model-override-args",), "there is nothing to override", accepted=("{}", "")),
    Foreign(("--mem-fraction-static",), "there is no GPU memory to divide; --kv-cache-bytes sizes the pool"),
    Foreign(("--max-prefill-tokens",), "--chunked-prefill-size bounds a pass"),
    Foreign(("--sampling-backend",), "there is one sampler"),
    Foreign(("--grammar-backend",), "there is no choice of grammar engines"),
    Foreign(("--schedule-conservativeness",), "running requests are retracted when memory runs out"),
    Foreign(("--cuda-graph-max-bs",), "graphs need no limit here"),
    Foreign(("--disable-cuda-graph",), "graphs aren't used", switch=True),
    Foreign(("--disable-overlap-schedule",), "passes don't overlap", switch=True),
    Foreign(("--enable-cache-report",), "replies always report cached tokens", switch=True),
    Foreign(("--enable-memory-saver",), "memory can always be released", switch=True),
    Foreign(("--log-requests",), "each request is logged in one line, never with its text", switch=True),
)

REFUSED = (
    Foreign(("--quantization",), "weights are used in the format they are stored in; choose a --dtype"),
    Foreign(("--trust-remote-code",), "code that comes with models is never run", switch=True),
    Foreign(("--stream-output", "--incremental-streaming-output"), "frames carry the whole text so far", switch=True),
    Foreign(("--allow-auto-truncate",), "prompts that are too long are refused, never cut", switch=True),
    Foreign(("--enable-custom-logit-processor",), "code from requests is never run; write a plugin", switch=True),
    Foreign(("--completion-template",), "there are no completion templates; --chat-template takes a file"),
    Foreign(("--expert-balancedness-report-mode",), "GET /expert_distribution reports balancedness"),
)


def flags() -> list[Flag]:
    """Hidden options for all of them."""
    return [foreign.flag for foreign in (*IGNORED, *REFUSED)]


def settle(given: dict[str, Any]) -> None:
    """Log what is ignored among the ``given`` flags; ConfigError for what can't be honoured."""
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
