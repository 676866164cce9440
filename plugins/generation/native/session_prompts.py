"""The prompts of a request that continue sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import RequestError
from trunkline.core.server.api import locate_errors
from trunkline.core.types import Reply, ServedModel

from .body_schemas import SessionParams
from .sessions import BUSY, MAX_NODES, Node, Session, Sessions


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a prompt continues: the request ``parent`` of a session, or nothing (None)."""

    session: Session
    params: SessionParams
    parent: Node | None


class SessionPrompts:
    """Puts the tokens of earlier requests before the prompts, then adds the request to the sessions.

    Call :meth:`restore` before the prompts are checked. Call :meth:`check_unchanged`, submit, and call
    :meth:`add_requests` without awaiting in between.
    """

    def __init__(self, sessions: Sessions, params: Sequence[SessionParams], served: ServedModel) -> None:
        """``params``: for each prompt, with the id of a session."""
        self._sessions = sessions
        self._params = params
        self._served = served
        self._continuations: list[Continuation] = []
        self._prompts: list[list[int]] = []

    def restore(self, prompts: Sequence[list[int]], bos: int | None, field: str, *, single: bool) -> list[list[int]]:
        """The prompts, with the tokens that they continue before them, and without a BOS token between these.

        RequestError if a session isn't open, belongs to another model, or can't be continued in this way.
        """
        for index, (prompt, params) in enumerate(zip(prompts, self._params, strict=True)):
            with locate_errors(field, index, single=single):
                continuation = self._continuation(params)
                if (parent := continuation.parent) is not None:
                    prompt = parent.context(params) + (prompt[1:] if prompt[:1] == [bos] else prompt)
                if not prompt:
                    raise RequestError("A session request must contain input tokens after restoring history.")
            self._continuations.append(continuation)
            self._prompts.append(prompt)
        self._sessions.make_room(sum(map(len, self._prompts)), [each.session for each in self._continuations])
        return self._prompts

    def _continuation(self, params: SessionParams) -> Continuation:
        session = self._sessions.get(params.id or "")
        if session.model and session.model not in (self._served.name, *self._served.aliases):
            raise RequestError(
                f"The session {session.name!r} has tokens of the model {session.model!r}; open another one for "
                f"{self._served.name!r}.",
                param="session_params",
            )
        earlier = [each for each in self._continuations if each.session is session]
        if earlier and session.streaming:
            raise RequestError(BUSY, param="session_params")
        if any(each.params.replace for each in earlier) or (earlier and params.replace):
            raise RequestError(
                "A prompt of a batch that replaces requests of a session must be the only one of that session.",
                param="session_params",
            )
        if len(session.nodes) + len(earlier) >= MAX_NODES and not (params.replace or session.streaming):
            raise RequestError(
                f"The session {session.name!r} may have {MAX_NODES} requests; it has {len(session.nodes)}, and this "
                "batch adds more than are left. Replace one with session_params.replace, or open another session.",
                param="session_params",
            )
        return Continuation(session, params, session.find(params))

    def check_unchanged(self) -> None:
        """RequestError if another request has changed a session since :meth:`restore`."""
        for each in self._continuations:
            session = self._sessions.get(each.session.name)
            if session is not each.session or session.find(each.params) is not each.parent:
                raise RequestError(
                    f"The session {each.session.name!r} was changed by another request; send this one again.",
                    param="session_params",
                )

    def add_requests(self, replies: Sequence[Reply]) -> None:
        """Add the submitted prompts to their sessions."""
        for each, prompt, reply in zip(self._continuations, self._prompts, replies, strict=True):
            each.session.model = self._served.name
            self._sessions.add_request(each.session, each.params, Node(reply.rid, prompt, reply, each.parent))
