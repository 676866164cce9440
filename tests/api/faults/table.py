"""The fault matrix: each fault, what the server does about it, and how requests may end.

``docs/generate_reliability.py`` makes the table in docs/reliability.md of this, and test_matrix.py causes each fault.
This file imports nothing of the project, so that it can be loaded by its path.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWERED, RETRY, FAILED, ABORTED = "answered", "503", "500", "aborted stream"
CLOSED, DROPPED, CUT = "closed by the server", "dropped by the client", "cut off"

OUTCOMES = {
    ANSWERED: "the whole answer, equal to that of an undisturbed server",
    RETRY: "503 with `Retry-After`",
    FAILED: "500, in a stream that has begun as the `status_code` of an abort",
    ABORTED: "a stream ends with the tokens so far, `finish_reason` abort and `status_code` 503, or with an error "
    "event if there are none",
    CLOSED: "the server closes the connection of a client that doesn't read",
    DROPPED: "the client closes the connection",
    CUT: "the connection closes before the reply has ended",
}
"""How a request may end, with an explanation. Everything else counts as lost."""

LOAD = "24 requests of 8 clients, for tokens (every second one streamed) and vectors"

MAIN = (
    "--task", "generation,embedding", "--served-model-name", "tiny", "--dtype", "float32", "--threads", "1",
    "--max-running-requests", "8", "--max-total-tokens", "4096", "--stream-timeout", "3",
)  # fmt: skip
SMALL_POOL = tuple("512" if flag == "4096" else flag for flag in MAIN)


@dataclass(frozen=True)
class Fault:
    """A row of the table. ``allowed``: outcomes of requests besides ``answered``. ``flags``: those of the server."""

    name: str
    server: str
    clients: str
    tuning: str = ""
    allowed: tuple[str, ...] = ()
    flags: tuple[str, ...] = MAIN
    title: str = ""

    @property
    def shown(self) -> str:
        """The fault as the page names it."""
        return self.title or self.name[:1].upper() + self.name[1:]


INTERRUPTED = (RETRY, ABORTED)
RESTARTED = (
    "Requests in flight and during the restart get 503 with `Retry-After`, a stream that has begun ends with an abort."
)
UNAFFECTED = "All requests are answered."
REFUSED = "The update gets 400 with the reason. All requests are answered, with the old weights."
KEPT = "It refuses the update before anything is replaced."
REPLACED = "A new engine process loads the old weights."

PROCESS = (
    Fault(
        "kill -9",
        title="`kill -9` of the engine",
        server="The front starts a new engine process. Five crashes within five minutes end the server.",
        clients=RESTARTED,
        tuning="Load time of the model: keep the checkpoint on a local disk.",
        allowed=INTERRUPTED,
    ),
    Fault(
        "kill -STOP",
        title="`kill -STOP` of the engine",
        server="`/health` is 503 after 10 s without a heartbeat; after 30 s a new engine process replaces it "
        "(2 s and 10 s in this test).",
        clients=f"Requests wait until then. {RESTARTED}",
        tuning="`--request-timeout` ends the wait earlier.",
        allowed=INTERRUPTED,
    ),
    Fault(
        "kill -STOP, then -CONT",
        title="`kill -STOP`, and `kill -CONT` within 30 s",
        server="`/health` is 503 until the next heartbeat. Nothing is restarted.",
        clients="Requests wait, and all are answered.",
        tuning="`--request-timeout` ends the wait earlier.",
    ),
    Fault(
        "SIGTERM",
        title="SIGTERM under load",
        server="It drains: `/health` is 503, running requests finish, the exit status is 0.",
        clients="Requests in flight are answered. New ones get 503 with `Retry-After`.",
        tuning="`--drain-timeout`",
        allowed=(RETRY,),
    ),
)
PASSES = (
    Fault(
        "a pass raises once",
        server="Each request of the pass is computed again, alone.",
        clients=UNAFFECTED,
    ),
    Fault(
        "a pass raises for one request",
        server="Each request of the pass is computed again, alone; the one that fails again ends.",
        clients="This request gets 500. All others are answered.",
        allowed=(FAILED,),
    ),
    Fault(
        "out of memory in a pass",
        server="`torch.OutOfMemoryError` and `MemoryError` are handled as any exception of a pass.",
        clients=UNAFFECTED,
        tuning="`--chunked-prefill-size`, `--max-running-requests`",
    ),
    Fault(
        "an allocation fails",
        title="An allocation fails because of a limit on the process (`RLIMIT_AS`)",
        server="As any exception of a pass; the memory of the pass is freed.",
        clients=UNAFFECTED,
        tuning="`--chunked-prefill-size`, `--max-running-requests`",
    ),
    Fault(
        "a request kills the engine",
        title="A request whose pass ends the process by SIGKILL, as the kernel does without memory",
        server="A new engine process runs a request of this pass alone when it is sent again; if the engine dies "
        "again, it rejects this request from then on.",
        clients=f"{RESTARTED} The request that kills gets 500 at its second attempt and later.",
        tuning="`--chunked-prefill-size`, `--max-running-requests`, `--max-total-tokens`",
        allowed=(*INTERRUPTED, FAILED),
    ),
    Fault(
        "a full pool",
        title="A full pool: requests need several times its slots",
        server="Running requests are retracted: their slots are freed, and they are computed again later.",
        clients=f"{UNAFFECTED} Tokens are those of an undisturbed server.",
        tuning="`--max-total-tokens`, `--max-running-requests`",
        flags=SMALL_POOL,
    ),
)
CLIENTS = (
    Fault(
        "a slow reader",
        title="Clients that don't read their streams",
        server="One state per request is kept, no queue of frames: its memory grows by less than 64 MiB. The "
        "connection is closed after `--stream-timeout`.",
        clients="Their streams are closed. All other requests are answered.",
        tuning="`--stream-timeout`",
        allowed=(CLOSED,),
    ),
    Fault(
        "a dropped client",
        title="Clients that disconnect, streaming or waiting",
        server="Their slots are free within two passes.",
        clients="All other requests are answered.",
        allowed=(DROPPED,),
    ),
)
UPDATES = (
    Fault("update: another config", title="Weight update: config.json of another model", server=KEPT, clients=REFUSED),
    Fault("update: a tensor is missing", title="Weight update: a tensor is missing", server=KEPT, clients=REFUSED),
    Fault("update: an unknown tensor", title="Weight update: an unknown tensor", server=KEPT, clients=REFUSED),
    Fault("update: a wrong shape", title="Weight update: a tensor of another shape", server=KEPT, clients=REFUSED),
    Fault("update: a wrong dtype", title="Weight update: a tensor of integers", server=KEPT, clients=REFUSED),
    Fault("update: a cut file", title="Weight update: the file ends in the middle", server=KEPT, clients=REFUSED),
    Fault(
        "update: a damaged header", title="Weight update: the file's header is damaged", server=KEPT, clients=REFUSED
    ),
    Fault(
        "update: no memory",
        title="Weight update: too little memory is free for both sets of weights",
        server=KEPT,
        clients=REFUSED,
        tuning="`--max-total-tokens`, `--kv-cache-bytes`",
    ),
    Fault("update: reading raises", title="Weight update: an exception while reading", server=KEPT, clients=REFUSED),
    Fault("update: packing raises", title="Weight update: no memory while packing", server=KEPT, clients=REFUSED),
    Fault(
        "update: the last step raises",
        title="Weight update: an exception after loading, before the swap",
        server=KEPT,
        clients=REFUSED,
    ),
    Fault(
        "update: the swap raises",
        title="Weight update: an exception in the swap",
        server=f"The engine process ends, since its state is unknown. {REPLACED}",
        clients=f"The update gets 503. {RESTARTED}",
        allowed=INTERRUPTED,
    ),
    Fault(
        "update: kill -9",
        title="Weight update: `kill -9` of the engine while it loads",
        server=REPLACED,
        clients=f"The update gets 503. {RESTARTED}",
        allowed=INTERRUPTED,
    ),
)

FAULTS = (*PROCESS, *PASSES, *CLIENTS, *UPDATES)

THE_OTHERS = "Requests of the other replicas are answered."
LOST_REPLICA = (
    "Requests that had begun at the replica get 503 with `Retry-After`, or an abort in a stream; others run "
    f"at another one. {THE_OTHERS}"
)

REPLICAS = (
    Fault(
        "replica: kill -9 of its engine",
        title="`kill -9` of an engine",
        server="The replica starts a new engine process.",
        clients=LOST_REPLICA,
        allowed=INTERRUPTED,
    ),
    Fault(
        "replica: kill -STOP of its engine",
        title="`kill -STOP` of an engine",
        server="After 10 s without a heartbeat the replica gets no new requests; after 30 s it starts a new engine "
        "process (2 s and 10 s in this test).",
        clients=f"Requests at the replica wait until then. {LOST_REPLICA}",
        tuning="`--request-timeout` ends the wait earlier.",
        allowed=INTERRUPTED,
    ),
    Fault(
        "replica: a slow engine",
        title="An engine is stopped and continued, again and again",
        server="Nothing is restarted.",
        clients=UNAFFECTED,
    ),
    Fault(
        "replica: kill -9 of its actor",
        title="`kill -9` of a replica's actor",
        server="Its engine process ends with it. Ray starts another replica.",
        clients=LOST_REPLICA,
        allowed=INTERRUPTED,
    ),
    Fault(
        "a node is lost",
        title="A node of Ray is lost, and later another one is added",
        server="Ray starts the replica again when there is a place for it.",
        clients=LOST_REPLICA,
        allowed=INTERRUPTED,
    ),
    Fault(
        "scale 3, 1, 3",
        title="From three replicas to one, and back to three",
        server="A replica that is removed gets no new requests, and ends when those that it runs have ended.",
        clients=UNAFFECTED,
        tuning="`--drain-timeout`",
    ),
    Fault(
        "update: a replica dies while it loads",
        title="Weight update: an engine is killed while it loads",
        server="The other replicas drop the new weights.",
        clients=f"The update gets 503. {LOST_REPLICA}",
        allowed=INTERRUPTED,
    ),
    Fault(
        "update: a replica dies in the swap",
        title="Weight update: an engine is killed when it applies the new weights",
        server="The other replicas apply them. This one loads them before it gets requests.",
        clients=f"The update is successful. Each answer is computed with one version of the weights. {LOST_REPLICA}",
        allowed=INTERRUPTED,
    ),
    Fault(
        "the ingress is killed",
        title="`kill -9` of the ingress behind Ray's proxy",
        server="Ray starts it again. The replicas abort its requests.",
        clients="Requests in flight get 500 of Ray's proxy, or their connection closes. Later ones wait.",
        allowed=(FAILED, CUT),
    ),
)
"""Faults of three engine replicas on Ray: two on its first node, one on another."""
