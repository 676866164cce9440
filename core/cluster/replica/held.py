"""``HeldUpdates``: the weight updates that a replica holds for fronts, which commit or cancel them.

See core/engine/control/updates.py. One whose front is gone must be cancelled: requests wait for it.
"""

from __future__ import annotations

from trunkline.core.engine.messages import Call

# Controls with the argument ``hold``.
END_HOLD = ("commit_update", "cancel_update")
HELD = ("update_weights", "update_weights_from_tensor", *END_HOLD)


class HeldUpdates:
    """Updates by their tokens. Methods that take a call do nothing with one that isn't about an update."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[object, str]] = {}  # by token: the front and the model

    def begin(self, front: object, call: Call) -> None:
        """A front makes a call."""
        if token := _token(call):
            self._held[token] = front, call.model

    def end(self, call: Call) -> None:
        """The engine has answered a call."""
        if call.control in END_HOLD:
            self._held.pop(_token(call), None)

    def abandon(self, call: Call) -> list[tuple[str, str]]:
        """Forget the update of a call whose answer isn't awaited any more. It must be cancelled: its token and model,
        in a list that is empty if there is none."""
        token = _token(call)
        held = self._held.pop(token, None)
        return [] if held is None else [(token, held[1])]

    def abandon_all(self, front: object) -> list[tuple[str, str]]:
        """The same with all updates of a front."""
        found = [(token, model) for token, (holder, model) in self._held.items() if holder is front]
        for token, _ in found:
            del self._held[token]
        return found

    def clear(self) -> None:
        """The engine was lost."""
        self._held.clear()


def _token(call: Call) -> str:
    token: str = call.arguments.get("hold", "") if call.control in HELD else ""
    return token
