"""Values that cross the plugin boundary.

Plugins see these and :mod:`trunkline.core.hookspecs`, never the classes behind them.
Heavy libraries are imported for type checkers only: this module must stay cheap, because
``trunkline --help`` imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from msgspec import Meta, Struct

from .errors import RequestError

if TYPE_CHECKING:
    import torch


# -- settings and models ---------------------------------------------------------------------


class SettingsGroup(Struct, frozen=True):
    """One TOML table and one panel of flags, described by a frozen ``msgspec.Struct``.

    Every field needs a default and ``Annotated[..., Meta(description=...)]``; the flag is the
    field's name with dashes. A field name claimed by two groups stops start-up.
    """

    name: str
    schema: type[Struct]


Settings = Mapping[str, Any]
"""All settings by group name: ``settings["shout"].shout_level``."""


class ModelSource(Struct, frozen=True):
    """Where a model's files are. ``reference`` is what the user wrote, ``path`` a local folder."""

    reference: str
    path: str


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What a checkpoint is, read from its folder before anything heavy is loaded."""

    path: str  # local folder
    architecture: str  # transformers class, config.json "architectures"[0]
    model_type: str
    context_length: int  # tokens; the config's limit, or the smaller one that was asked for
    vocab_size: int
    hidden_size: int
    causal: bool
    num_experts: int = 0  # 0 = dense
    eos_token_ids: tuple[int, ...] = ()
    is_embedding: bool = False  # the user's --is-embedding
    score_rows: str = ""  # what the head "score" is applied to: the "first", "last" or "mean" row; "" = no such head
    config: dict[str, Any] = {}  # config.json as it stands


class Serves(Struct, frozen=True):
    """A task's answer to "can you serve this checkpoint?".

    ``when`` is ``"default"``, ``"on_request"`` (only with ``--task``) or ``"no"``;
    ``reason`` is the sentence that users see for the last two.
    """

    task: str
    when: str
    reason: str = ""


class ServedModel(Struct, frozen=True, kw_only=True):
    """A model as the front process knows it, after the engine has loaded it."""

    name: str
    aliases: tuple[str, ...] = ()
    model_path: str  # as the user gave it
    tokenizer_path: str
    info: ModelInfo
    tasks: dict[str, bool]  # task -> does its stage decode
    refused: dict[str, str] = {}  # task -> why this model doesn't serve it
    max_total_tokens: int  # KV slots, or tokens of one pass where nothing is kept; bounds a request, too
    max_running_requests: int
    chunked_prefill_size: int = -1  # most tokens of one pass, -1 = no limit
    dtype: str
    attention_backend: str
    weight_version: str = "default"
    fused: str = ""  # what fuse.py did, for /model_info

    @property
    def is_generation(self) -> bool:
        return any(self.tasks.values())

    @property
    def max_request_tokens(self) -> int:
        """Upper bound on prompt + new tokens of one request."""
        return min(self.info.context_length, self.max_total_tokens)


class Tokenizer(Protocol):
    """The part of transformers' fast tokenizer that core and plugins use."""

    chat_template: str | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Head:
    """Modules on top of the backbone.

    ``build(model)`` gets the loaded transformers class (backbone and its own head modules) and
    returns ``f(hidden [R, hidden_size]) -> Tensor [R, ...]``.
    ``reference(model, input_ids [1, T])`` runs the class's own ``forward`` and returns what
    ``f`` must give for the row that ``rows`` names, ``[1, ...]``; core compares both at load and
    refuses the head's tasks when they differ (models whose ``forward`` does more than its parts).
    ``rows``: the ``"last"`` or the ``"first"`` position's row, or the ``"mean"`` of all.

    With ``float32``, ``f`` gets float32 rows, and the modules that ``build`` finds beside the backbone
    are float32 copies. Without it (heads as wide as the vocabulary) both have the model's dtype.
    """

    name: str
    build: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]
    reference: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    rows: str = "last"
    float32: bool = True


class Model(Protocol):
    """A loaded model, as stages see it (engine process)."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype
    max_request_tokens: int

    @property
    def heads(self) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
        """The verified heads by name.

        Core's own: "lm" gives the logits ``[R, vocab_size]`` of every causal checkpoint with an output matrix,
        "score" the scores ``[R, labels]`` of a ``…ForSequenceClassification``. Another head of the model is there
        when the task of its plugin is active.
        """

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The active stages by task; empty until ``trunkline_stages`` was asked."""

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """Where tokens are sent to experts; None for a dense model."""

    @property
    def expert_observers(self) -> Sequence[ExpertObserver]:
        """Those that ``trunkline_expert_observers`` gave for this model."""


# -- requests in the engine ------------------------------------------------------------------


class Needs(Struct, frozen=True):
    """What a request wants of the scheduler; the answer of ``Stage.admit``.

    ``new_tokens`` bounds how many tokens it may add (0: it holds room for none).
    ``rows_from`` is the first position whose hidden row the stage wants; None = the last only.
    ``reuse_up_to`` caps how many cached prefix tokens may stand in for computing; None = all but
    the last. ``lockstep``: its next step needs this one collected first (no running ahead).
    """

    new_tokens: Annotated[int, Meta(ge=0)] = 0
    rows_from: Annotated[int, Meta(ge=0)] | None = None  # below the prompt's length
    reuse_up_to: Annotated[int, Meta(ge=0)] | None = None
    lockstep: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One sequence in the engine. All lengths follow from ``tokens``, ``prompt_len``, ``computed``.

    ``tokens`` = prompt, then output. Positions ``[0, computed)`` have keys and values in the
    pool; a request is decoding when exactly its last token is not computed and it has output.
    """

    key: int  # unique in the engine process
    rid: str  # the client's id
    task: str
    params: Any  # the stage's ``params`` struct
    tokens: list[int]
    prompt_len: int
    needs: Needs = field(default_factory=Needs)
    priority: int = 0
    namespace: bytes = b""  # separates cache entries (model epoch, salt)
    cacheable: bool = True  # False: neither reads nor fills the cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins: token type 1 from here on
    alone: bool = False  # computed in forward passes of its own
    arrived: float = 0.0  # time.monotonic()
    started: float = 0.0  # first scheduled, 0 = never
    computed: int = 0
    cached: int = 0  # prompt tokens taken from the cache when first scheduled
    state: Any = None  # the stage's own
    schedule: Any = None  # the scheduler's own

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def extend_len(self) -> int:
        """Tokens known but not yet computed."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class PartRow:
    """A request's share of one batch: positions ``[start, end)`` were computed in it.

    The stage gets hidden rows for positions ``[first, end)`` at ``hidden[offset : offset + end - first]``.
    ``final``: ``end`` is the last known token, so a decoding stage may produce the next one.
    """

    request: Request
    start: int
    end: int
    first: int
    offset: int
    final: bool


@dataclass(slots=True)
class Part:
    """One task's rows in a batch. A request with no wanted row is not in it."""

    task: str
    rows: list[PartRow]
    inputs: Any = None  # whatever ``prepare`` wants to hand to ``launch``


@dataclass(slots=True)
class Launched:
    """Device tensors of a part. ``next_ids`` int64 ``[len(rows)]`` feeds the next decode step."""

    next_ids: torch.Tensor | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """One result for one request. ``finish`` (the client's finish_reason) or ``error`` ends it."""

    request: Request
    tokens: tuple[int, ...] = ()  # ids in the vocabulary; none before the whole prompt is computed
    data: Any = None  # the stage's ``result`` struct
    finish: dict[str, Any] | None = None  # with a "type"
    error: RequestError | None = None


class Stage(ABC):
    """A task's code in the engine, one object per loaded model.

    Called by the loop in this order: ``admit`` once; per batch ``prepare``, ``launch``,
    ``collect``; ``reset`` when the request was retracted; ``release`` exactly once per
    successful ``admit``. An exception in a per-request call ends that request only, and so does a
    value that is not what the method should return. When five requests in a row fail so, the task
    answers 503 until ``POST /plugins/NAME/enable`` or a restart. ``admit`` and ``collect`` hold up
    all other requests: keep them well below 100 ms.
    """

    task: ClassVar[str]
    decodes: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ()  # names of the heads it calls; without them it is refused
    params: ClassVar[type[Struct]]
    result: ClassVar[type[Struct]]

    @abstractmethod
    def admit(self, request: Request) -> Needs:
        """Validate and build ``request.state``. ``RequestError`` becomes the client's 4xx."""

    def reset(self, request: Request) -> None:
        """The request was retracted: drop state that will be recomputed."""

    def prepare(self, part: Part) -> None:
        """Host side, before the forward pass; may fill ``part.inputs``."""

    @abstractmethod
    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        """Device side, without synchronising. ``hidden`` is ``[R, hidden_size]``, see PartRow."""

    @abstractmethod
    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        """Host side. ``tensors`` is ``Launched.tensors`` on the CPU, with ``"next_ids"`` added.

        A final row needs a step, and no step may follow the one with ``finish`` or ``error``; a
        request has at most ``Needs.new_tokens`` tokens of output. Where this is broken, the
        request fails.
        """

    @abstractmethod
    def probe(self) -> tuple[list[int], Struct]:
        """Prompt ids and params of the smallest request: warm-up and /health_generate."""

    def release(self, request: Request) -> None:
        """The request left the engine, whatever the reason."""


# -- experts ---------------------------------------------------------------------------------


class ExpertLayers(Struct, frozen=True):
    """``layers``: the numbers of the decoder layers, of ``depth``, whose tokens choose among ``experts``.

    ``unseen`` says why choices can't be observed, "" where they can.
    """

    layers: tuple[int, ...]
    depth: int
    experts: int
    unseen: str = ""


class PassRow(Protocol):
    """A request's share of a pass: its positions ``[start, end)``. Rows are packed one after another."""

    @property
    def request(self) -> Request:
        """``request.key`` is negative for the engine's own: health probes and warm-up."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class ExpertObserver(Protocol):
    """Sees the experts that tokens are sent to, one object per loaded model.

    Called in the engine's thread: ``begin_pass``, ``observe`` once per layer with experts,
    ``end_pass``. A pass that fails has no end, and its rows come again. One that raises misses
    the rest of the pass.
    """

    @property
    def active(self) -> bool:
        """Asked before each pass; while it is false the pass is not shown, which costs nothing."""

    def begin_pass(self, rows: Sequence[PassRow]) -> None:
        """A pass over these rows begins."""

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        """``chosen``: the experts of each packed token, int64 ``[T, k]``, in decoder layer ``layer``.

        On the model's device. Keep it if you like, don't change it, and don't wait for the device.
        """

    def end_pass(self) -> None:
        """All layers of the pass were shown, and its results are on the CPU."""


# -- the front process -----------------------------------------------------------------------


class Reply(Protocol):
    """The front's one state of a submitted request; it grows until ``finish`` or ``error``.

    Producers never wait for consumers: whoever reads slowly sees several steps at once.
    """

    rid: str
    prompt_tokens: int
    cached_tokens: int
    weight_version: str  # label of the weights that it runs with; "" until it has started
    tokens: list[int]  # all output tokens so far
    data: Any  # last ``Stage.result`` received, as builtins (``msgspec.convert`` it), or None
    finish: dict[str, Any] | None
    error: RequestError | None
    created: float  # time.perf_counter()
    finished: float

    async def wait(self) -> None:
        """Return when something arrived since the last call, or at once when it is over."""

    async def result(self) -> None:
        """Return when it is over; raise ``error`` if it has one."""

    def cancel(self) -> None:
        """Abort in the engine and free everything; harmless when it is over."""


class Submission(Struct, frozen=True, kw_only=True):
    """One sequence to run. ``params`` is the stage's params struct."""

    prompt: list[int]
    params: Any
    rid: str
    priority: int = 0
    salt: bytes = b""
    cacheable: bool = True  # False: neither reads nor fills the prefix cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins; models without token types ignore it
    volatile: tuple[str, ...] = ()  # fields of ``params`` that differ when a client sends the same again: random seeds


class EngineClient(Protocol):
    """What routes get: the engine, seen from the front process."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """What is loaded; the first is the primary."""

    def choose(self, task: str, name: str | None = None) -> ServedModel:
        """The model for a request: the named one, else the first that serves the task.

        ``default``, ``unknown`` and ``dummy`` count as no name. Another unknown name means the only model that
        serves the task; RequestError with their names when several do, and when the task isn't served.
        """

    def tokenizer(self, model: str) -> Tokenizer | None: ...

    async def tokenize(
        self, model: str, texts: Sequence[str], *, special: bool = True, limit: int | None = None
    ) -> list[list[int]]:
        """Token ids, computed off the event loop.

        Give ``limit``, in tokens, where longer texts are of no use: RequestError 400 for one that is
        longer by far, without the time that all of it would take. What is just too long is returned.
        """

    async def off_loop(self, function: Callable[..., Any], *args: Any, size: int = 0) -> Any:
        """Run CPU work of a request off the event loop.

        ``size`` is the number of characters or bytes that it works on: more than 32,768 don't hold up
        the work of other requests.
        """

    def submit(self, model: str, task: str, items: Sequence[Submission]) -> list[Reply]:
        """Queue all or none. QueueFull when they don't fit now, RequestError when they never will."""

    def abort(self, prefix: str = "", *, everything: bool = False) -> int:
        """Abort live requests whose rid starts with ``prefix``; returns how many."""

    def call(self, control: str, *, model: str | None = None, **arguments: Any) -> Awaitable[Any]:
        """Run a control (hook ``controls``) in the engine between two batches."""
