"""How many slots are reserved for the output of running requests."""

from __future__ import annotations

from .waiting import Entry

MAX_EXPECTED_NEW = 4096  # tokens; at admission, a larger limit on new tokens is reduced to this
START = 0.5
MIN = 0.1
DECAY = 0.99  # factor per pass
RISE = 2.0  # factor per retraction


class Reserve:
    """Most requests end before their limit on new tokens. So only a share of these tokens is reserved at admission,
    ``ratio`` (SGLang's new-token ratio): it falls with each pass and rises with each retraction."""

    def __init__(self) -> None:
        self.ratio = START

    def lower(self) -> None:
        """A pass is planned."""
        self.ratio = max(MIN, self.ratio * DECAY)

    def rise(self) -> None:
        """A request was retracted: too little was reserved."""
        self.ratio = min(1.0, self.ratio * RISE)

    def slots(self, entry: Entry) -> int:
        """Slots to reserve for a request: for its known tokens, and for a share of its new tokens."""
        request, length = entry.request, entry.length
        new = min(request.needs.new_tokens - length + request.prompt_len, MAX_EXPECTED_NEW)
        return length - entry.allocated + max(0, int(new * self.ratio))
