"""The prompts of one request that continue sessions: restored before they are checked, recorded when submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import RequestError
from trunkline.core.server.api import locate_errors
from trunkline.core.types import Reply, ServedModel

from .body_schemas import SessionParams
from .sessions import BUSY, MAX_NODES, Node, Session, Sessions


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt of a request, and what it continues."""

    session: Session
    params: SessionParams
    parent: Node | None


class Turns:
    """A request's share in sessions. :meth:`restore`, then, without a pause after submitting, the other two."""

    def __init__(self, sessions: Sessions, params: Sequence[SessionParams], served: ServedModel) -> None:
        """``params``: one for each prompt, with an id."""
        self._sessions = sessions
        self._params = params
        self._served = served
        self._turns: list[Turn] = []
        self._prompts: list[list[int]] = []

    def restore(self, prompts: Sequence[list[int]], bos: int | None, field: str, *, single: bool) -> list[list[int]]:
        """The prompts with the tokens that they continue before them, and without a BOS in the middle.

        RequestError when a session is gone, belongs to another model, or can't be continued so.
        """
        for index, (prompt, params) in enumerate(zip(prompts, self._params, strict=True)):
            with locate_errors(field, index, single=single):
                turn = self._turn(params)
                if turn.parent is not None:
                    prompt = turn.parent.context(params) + (prompt[1:] if prompt[:1] == [bos] else prompt)
                if not prompt:
                    raise RequestError("A session request must contain input tokens after restoring history.")
            self._turns.append(turn)
            self._prompts.append(prompt)
        self._sessions.make_room(sum(map(len, self._prompts)), [turn.session for turn in self._turns])
        return self._prompts

    def _turn(self, params: SessionParams) -> Turn:
        session = self._sessions.get(params.id or "")
        if session.model and session.model not in (self._served.name, *self._served.aliases):
            raise RequestError(
                f"The session {session.name!r} has tokens of the model {session.model!r}; open another one for "
                f"{self._served.name!r}.",
                param="session_params",
            )
        earlier = [turn for turn in self._turns if turn.session is session]
        if earlier and session.streaming:
            raise RequestError(BUSY, param="session_params")
        if any(turn.params.replace for turn in earlier) or (earlier and params.replace):
            raise RequestError(
                "A prompt of a batch that replaces requests of a session must be the only one of that session.",
                param="session_params",
            )
        if len(session.kept) + len(earlier) >= MAX_NODES and not (params.replace or session.streaming):
            raise RequestError(
                f"The session {session.name!r} has {len(session.kept)} requests, as many as it may; replace one with "
                "session_params.replace, or open another session.",
                param="session_params",
            )
        return Turn(session, params, session.find(params))

    def claim(self) -> None:
        """RequestError when a session has changed since :meth:`restore`, so that the prompts aren't its any more."""
        for turn in self._turns:
            session = self._sessions.get(turn.session.name)
            if session is not turn.session or session.find(turn.params) is not turn.parent:
                raise RequestError(
                    f"The session {turn.session.name!r} was changed by another request; send this one again.",
                    param="session_params",
                )

    def record(self, replies: Sequence[Reply]) -> None:
        """The prompts have been submitted."""
        for turn, prompt, reply in zip(self._turns, self._prompts, replies, strict=True):
            turn.session.model = self._served.name
            self._sessions.record(turn.session, turn.params, Node(reply.rid, prompt, reply, turn.parent))
