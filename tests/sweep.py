"""Every text class of transformers, with tiny random weights: equal to transformers through the engine, or refused.

``python tests/sweep.py`` tries all of them and writes docs/architectures.md; names as arguments try these classes only.
The suite ``sweep`` (tests/core/model/test_sweep.py) tries a sample and compares with that file.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto

from trunkline.core import Engine
from trunkline.core.errors import TrunklineError
from trunkline.core.testing import randomize
from trunkline.core.testing.tiny import CONTEXT, tiny_config
from trunkline.core.types import Launched, Part, Submission
from trunkline.plugins.embedding.recipe import read_recipe
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.embedding.settings import EmbeddingSettings
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.reward.schemas import RewardParams

TABLE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
KINDS = {
    "generation": "Causal language models",
    "reward": "Sequence classification",
    "embedding": "Base models",
}
LONGEST = 400  # tokens of a prompt
CHUNK = 9  # tokens of a pass: all prompts but the first are computed in several, if the model allows it
NEW = 4  # tokens
GAP = 1e-3  # of the logits' spread, between the best two: closer ones may swap
TOLERANCE = 1e-4  # of the reference's spread
TEXT = ("CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "MASKED_LM", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")


class Case(NamedTuple):
    """A transformers class, and the task that it is tried with."""

    kind: str
    name: str

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.name)


class Outcome(NamedTuple):
    """``status``: served, refused, wrong (differs from transformers), broken (another error), unbuilt (no config).

    ``lacks_package``: unbuilt because an optional package of transformers isn't installed.
    """

    case: Case
    status: str
    detail: str
    lacks_package: bool = False


def cases() -> list[Case]:
    """What transformers maps to causal LM and sequence classification, and base models of text."""
    found = [Case("generation", name) for name in _classes("CAUSAL_LM")]
    found += [Case("reward", name) for name in _classes("SEQUENCE_CLASSIFICATION")]
    types = {key for mapping in TEXT for key in _mapping(mapping)}
    for key, names in modeling_auto.MODEL_MAPPING_NAMES.items():
        if key in types or key.endswith(("_text", "_text_model")):
            found += [Case("embedding", name) for name in ([names] if isinstance(names, str) else names)]
    return [case for case in dict.fromkeys(found) if hasattr(transformers, case.name) and _reads_text(case.cls)]


def _mapping(name: str) -> dict[str, str]:
    found: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
    return found


def _classes(name: str) -> list[str]:
    return list(dict.fromkeys(_mapping(name).values()))


def _reads_text(cls: Any) -> bool:
    inputs = inspect.signature(cls.forward).parameters
    others = ("pixel_values", "input_features", "input_values", "decoder_input_ids", "visual_feats")
    return "input_ids" in inputs and ("For" in cls.__name__ or not any(name in inputs for name in others))


def prompts() -> list[list[int]]:
    """The last one shares 33 tokens with the third."""
    draw = torch.Generator().manual_seed(7)
    made = [torch.randint(3, CONTEXT, (count,), generator=draw).tolist() for count in (5, 23, 41, 150, LONGEST)]
    return [*made, made[2][:33] + made[0]]


def try_case(case: Case, folder: Path, **config: Any) -> Outcome:
    """Build the class with random weights in ``folder``, start the engine on it, compare. ``config``: more settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever classes have to say
        return _try(case, folder, config)


def _try(case: Case, folder: Path, config: dict[str, Any]) -> Outcome:
    try:
        build(case, folder, config)
    except Exception as error:  # classes that need another package, or sizes that don't go together
        return Outcome(case, "unbuilt", f"{type(error).__name__}: {error}", _lacks_package(error))
    try:
        engine = start(case, folder)
    except TrunklineError as error:
        return Outcome(case, "refused", str(error))
    except Exception as error:
        return Outcome(case, "broken", f"{type(error).__name__}: {error}")
    with engine:
        tasks = list(engine.models[0].tasks)
        if case.kind not in tasks:
            return Outcome(case, "refused", engine.models[0].refused.get(case.kind, "it serves other tasks"))
        if faults := list(COMPARE[case.kind](engine, Reference(case, folder))):
            return Outcome(case, "wrong", "; ".join(faults[:4]))
        return Outcome(case, "served", engine.models[0].fused)


def _lacks_package(error: Exception) -> bool:
    """Transformers raises an ImportError without a module's name for an optional package that isn't installed."""
    return isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("trunkline", "transformers")


def start(case: Case, folder: Path) -> Engine:
    """The engine on a checkpoint; with a shorter context where the model has no limit or another one."""
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "chunked_prefill_size": CHUNK}
    options["is_embedding"] = case.kind == "embedding"
    try:
        return Engine(str(folder), **options)
    except TrunklineError as error:
        if "give --context-length" not in str(error):
            raise
        return Engine(str(folder), **options, context_length=LONGEST + NEW)


def build(case: Case, folder: Path, config: dict[str, Any]) -> None:
    made = tiny_config(case.cls.config_class, **config)
    if case.kind == "generation" and hasattr(made, "is_decoder"):
        made.is_decoder = True
    if case.kind == "reward":
        made.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        model = case.cls(made).float()
        randomize(model, 3)
    model.config.architectures = [case.name]
    model.save_pretrained(folder)


class Reference:
    """The class as transformers runs it, by itself. Every call is the first of a freshly loaded model."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self._loaded = case.cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._known: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: Sequence[int], second_at: int | None = None) -> Any:
        key = (*ids, -1, second_at or 0)
        if key not in self._known:
            types = {} if second_at is None else {"token_type_ids": (torch.arange(len(ids)) >= second_at).long()[None]}
            with torch.inference_mode():
                self._known[key] = copy.deepcopy(self._loaded)(torch.tensor([ids]), **types)
        return self._known[key]


def off(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the reference's spread."""
    spread = max(float(theirs.std()), float(theirs.abs().max()) / 10)
    return float((mine.float() - theirs.float()).abs().max()) / spread


def compare_generation(engine: Engine, reference: Reference) -> Iterator[str]:
    """Greedy tokens and the logits before each, of all prompts at once, computed and then from the cache."""
    logits = watch_logits(engine)
    params = GenerationParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    for turn in ("first", "again"):
        asked = prompts()
        items = [Submission(prompt=ids, params=params, rid=f"{turn}{len(ids)}") for ids in asked]
        tickets = engine.submit_all("generation", items)
        for ids, ticket in zip(asked, tickets, strict=True):
            tokens, known = ticket.result(120).tokens, list(ids)
            for token in tokens:
                expected = reference(known).logits[0, -1]
                error = off(logits[ticket.reply.rid, len(known)], expected)
                best = expected.topk(2).values
                if not error <= TOLERANCE:
                    yield f"{turn}, {len(ids)} tokens: logits off by {error:.0e}"
                if not error <= TOLERANCE or best[0] - best[1] < GAP * expected.std():
                    break
                if token != int(expected.argmax()):
                    yield f"{turn}, {len(ids)} tokens: another token"
                    break
                known.append(token)
        if turn == "again" and not all(ticket.reply.cached_tokens for ticket in tickets):
            yield "a repeated prompt was not cached"


def watch_logits(engine: Engine) -> dict[tuple[str, int], torch.Tensor]:
    """From now on: the logits ``[V]`` by request and number of tokens before them."""
    (lane,) = engine.client.transport.loop.lanes
    stage, head, seen = lane.stages["generation"], lane.model.heads["lm"], {}
    launch, latest = stage.launch, []

    def watched_head(hidden: torch.Tensor) -> torch.Tensor:
        latest[:] = [head(hidden)]
        return latest[0]

    def watched_launch(part: Part, hidden: torch.Tensor) -> Launched:
        launched = launch(part, hidden)
        for row, one in zip(part.rows, latest[0], strict=True):
            seen[row.request.rid, row.end] = one.clone()
        return launched

    lane.model.heads["lm"], stage.launch = watched_head, watched_launch
    return seen


def compare_reward(engine: Engine, reference: Reference) -> Iterator[str]:
    return compare_vectors(engine, "reward", RewardParams(), "scores", lambda *given: reference(*given).logits[0])


def compare_embedding(engine: Engine, reference: Reference) -> Iterator[str]:
    (mode,) = read_recipe(engine.models[0].info, EmbeddingSettings()).modes
    pool = {"mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0], "lasttoken": lambda rows: rows[-1]}[mode]

    def expected(ids: list[int], second_at: int | None) -> torch.Tensor:
        return pool(reference(ids, second_at).last_hidden_state[0])

    return compare_vectors(engine, "embedding", EmbeddingParams(normalize=False), "vector", expected)


def compare_vectors(
    engine: Engine, task: str, params: Any, field: str, expected: Callable[[list[int], int | None], torch.Tensor]
) -> Iterator[str]:
    """One vector a prompt, of all prompts at once, computed and then from the cache; with token types, pairs too."""
    (lane,) = engine.client.transport.loop.lanes
    for second_at in (None, 3) if lane.model.token_types else (None,):
        for turn in ("first", "again"):
            asked = prompts()
            tickets = [engine.submit(task, ids, params, second_at=second_at) for ids in asked]
            for ids, ticket in zip(asked, tickets, strict=True):
                mine = torch.from_numpy(np.frombuffer(ticket.result(120).data[field], "<f4").copy())
                error = off(mine, expected(ids, second_at))
                if not error <= TOLERANCE:
                    yield f"{turn}, {len(ids)} tokens{', a pair' if second_at else ''}: off by {error:.0e}"


COMPARE = {"generation": compare_generation, "reward": compare_reward, "embedding": compare_embedding}


def reason(outcome: Outcome) -> str:
    """Why a class is refused, without what differs from machine to machine."""
    text = " ".join(outcome.detail.split())
    text = re.sub(r"^\S+ can't be served[:.] |\S+/(?=config\.json)", "", text)
    text = re.sub(r" by [\d.e+-]+ \(relative\)| by nan \(relative\)", "", text)
    text = re.sub(r"No task can be served from \S+ \(\w+\)\. .*?generation: ", "", text)
    return re.sub(r" (rerank|reward|embedding): .*", "", text).replace("|", "\\|")[:240]


def row(outcome: Outcome) -> str:
    shown = outcome.detail if outcome.status == "served" else reason(outcome)
    return f"| {outcome.case.name} | {outcome.status} | {shown} |"


def table(outcomes: Sequence[Outcome]) -> str:
    """The page docs/architectures.md."""
    counts = ", ".join(
        f"{sum(one.status == status for one in outcomes)} {status}" for status in sorted({o.status for o in outcomes})
    )
    lines = [
        f"# Classes of transformers {transformers.__version__}",
        "",
        "Written by `python tests/sweep.py`: each class with tiny random weights in float32, through the whole engine,",
        "with prompts of 5 to 400 tokens in one batch, computed in chunks and again from the cache. Logits, scores and",
        "vectors are within 1e-4 of the spread of transformers' own, greedy tokens are the same; or the class is",
        "refused with the reason given here. Unbuilt: no tiny config could be made, or a package is missing. Options",
        "of a config can change the outcome: each checkpoint is checked when it is loaded.",
        "",
        f"{counts}.",
    ]
    for kind, title in KINDS.items():
        lines += ["", f"## {title}", "", "| class | | layers, or reason |", "|---|---|---|"]
        lines += [row(one) for one in sorted(outcomes, key=lambda one: one.case.name) if one.case.kind == kind]
    return "\n".join(lines) + "\n"


def known() -> dict[Case, str]:
    """Class and task -> status, as the page has it."""
    titles = {title: kind for kind, title in KINDS.items()}
    found, kind = {}, ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        kind = titles.get(line.removeprefix("## "), kind)
        if kind and (match := re.match(r"\| (\w+) \| (\w+) \|", line)):
            found[Case(kind, match[1])] = match[2]
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes to try; default all, and the page is written")
    names = parser.parse_args(arguments).names
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = []
    for case in cases():
        if names and case.name not in names:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(try_case(case, Path(folder)))
        print(f"{time.monotonic() - began:5.1f} s {case.kind:10} {row(outcomes[-1])}", flush=True)
    if not names:
        TABLE.write_text(table(outcomes), encoding="utf-8")
    return int(any(one.status in ("wrong", "broken") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
