"""Loads another checkpoint for a lane beside the one that it serves, and checks that it fits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from trunkline.core.config import Config
from trunkline.core.engine.candidates import Candidate, choose_tasks
from trunkline.core.engine.lane import Lane, Renewal
from trunkline.core.engine.memory import Grant, gib
from trunkline.core.engine.messages import NOT_FOUND
from trunkline.core.engine.resources import available_bytes
from trunkline.core.engine.runner import Runner
from trunkline.core.engine.startup import assemble
from trunkline.core.errors import ModelError, TrunklineError
from trunkline.core.host import Host
from trunkline.core.model import loader
from trunkline.core.model.sources import weights
from trunkline.core.model.sources.info import EXPERTS, read_config, read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelSource

from .tensors import Tensors, merge, receive
from .updates import Order, Refusal, UpdateTensors, UpdateWeights, release_memory

log = logging.getLogger("trunkline.engine")

REMEMBERED = 32  # of the first and of the latest names each; training may update thousands of times
# How configs call what a class makes many modules of.
COUNTS = (
    *EXPERTS, "n_shared_experts", "num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers",
)  # fmt: skip
MANY = 1 << 14  # of them, where the served model's config leaves the number to its class
FORMATS = ("auto", "safetensors")


class Renewer:
    """Loads; whoever calls puts the result into the lane. Whatever goes wrong, the lane isn't touched."""

    def __init__(self, lanes: Sequence[Lane], config: Config, host: Host) -> None:
        self._lanes = lanes
        self._config = config
        self._host = host

    def __call__(self, lane: Lane, order: Order) -> Renewal:
        """The lane's next weights. Refusal with the sentence for the client."""
        assert lane.candidate is not None  # start-up made it
        reference = order.model_path if isinstance(order, UpdateWeights) else lane.candidate.source.reference
        try:
            if isinstance(order, UpdateTensors):
                return self._load_sent(lane, lane.candidate, order)
            return self._load_folder(lane, lane.candidate, self._source(order), order)
        except Refusal:
            raise
        except TrunklineError as error:
            reason = str(error).removeprefix(f"{reference} can't be loaded: ").rstrip(".")
        except BaseException as error:  # whatever a foreign checkpoint or a plugin's hook brings up
            log.exception("weights for %s can't be loaded", reference)
            reason = f"{type(error).__name__}: {error}"
        release_memory()
        raise Refusal(f"Failed to update weights: {reason}.\nRolling back to original weights.")

    def _source(self, order: UpdateWeights) -> ModelSource:
        """The checkpoint's folder. Refusal when there is none, or none that could be loaded."""
        source = find(self._host, order.model_path, self._config.engine.allow_weights_dir)
        if order.load_format not in (None, *FORMATS):
            raise Refusal(f"Failed to get model loader: {order.load_format}. There are: {', '.join(FORMATS)}.")
        if weights.absent(source.path):
            raise Refusal(f"Failed to get weights iterator: Cannot find any model weights with `{order.model_path}`.")
        return source

    def _load_folder(self, lane: Lane, served: Candidate, source: ModelSource, order: UpdateWeights) -> Renewal:
        assert lane.grant is not None
        return self._load(lane, self._examine(lane, served, lane.grant, source, order), None)

    def _load_sent(self, lane: Lane, candidate: Candidate, order: UpdateTensors) -> Renewal:
        """The model as it is, but for tensors that were sent."""
        if self._config.engine.allow_weights_dir is not None:
            raise ModelError(f"Weights come from below {self._config.engine.allow_weights_dir} (--allow-weights-dir)")
        stored = lane.model.stored or dict(self._host.weights(candidate.source))
        renewal = self._load(lane, candidate, merge(stored, receive(Path(order.path)), lane.model.whole))
        label = lane.served.weight_version if order.weight_version is None else order.weight_version
        return replace(renewal, sent=True, served=msgspec.structs.replace(
            renewal.served, aliases=lane.served.aliases, weight_version=label
        ))  # fmt: skip

    def _load(self, lane: Lane, candidate: Candidate, tensors: Tensors | None) -> Renewal:
        assert lane.grant is not None
        needed, free = candidate.plan.weight_bytes, available_bytes()
        if needed > free:
            raise ModelError(
                f"The new weights need {needed} bytes ({gib(needed)}) beside the old ones, "
                f"but {free} bytes ({gib(free)}) of memory are free"
            )
        settings = self._config.settings_of(candidate.settings)
        given = None if tensors is None else tensors.items()
        served, model, stages = assemble(candidate, lane.grant, settings, self._host, lane.model.tokenizer, given)
        served = msgspec.structs.replace(served, tokenizer_path=lane.served.tokenizer_path)
        if lost := [task for task in lane.stages if task not in model.stages]:
            raise ModelError(f"The checkpoint doesn't serve {lost[0]}: {served.refused[lost[0]]}")
        if extra := sorted(model.unused - lane.model.unused):
            raise ModelError(
                f"The model has no place for {len(extra)} of the checkpoint's tensors, the first is {extra[0]}"
            )
        if model.kv_shapes != lane.model.kv_shapes or model.dtype != lane.model.dtype:
            raise ModelError("The checkpoint's keys and values have other shapes than the served model's")
        if model.expert_watch is not None:  # who counts goes on counting
            model.expert_watch.provided = lane.model.expert_watch.provided
        runner = Runner(model, stages, lane.runner.pool, lane.runner.table, model.expert_watch)
        return Renewal(candidate, served, model, stages, runner)

    def _examine(
        self, lane: Lane, served: Candidate, grant: Grant, source: ModelSource, order: UpdateWeights
    ) -> Candidate:
        """The checkpoint by its config. ModelError when it isn't the same model with other numbers in it."""
        own, current = self._next_settings(lane, order), lane.model.info
        check_counts(read_config(Path(source.path)), current.config)  # before any class is asked to fill it in
        info = read_info(source, own)
        if info.architecture != current.architecture:
            raise ModelError(f"The checkpoint is a {info.architecture}, the served model a {current.architecture}")
        if info.context_length < grant.context:
            raise ModelError(
                f"The checkpoint was made for {info.context_length} tokens, but {grant.context} are served"
            )
        tasks, refused = choose_tasks(own, info, self._host.serves(info, self._config.settings_of(own)))
        plan = loader.plan(source, info, own)
        for name, shape in served.plan.shapes.items():
            if name in plan.shapes and plan.shapes[name] != shape:
                raise ModelError(f"Attempted to load weight ({plan.shapes[name]}) into parameter ({shape}): {name}")
        if different := sorted(plan.shapes.keys() ^ served.plan.shapes.keys()):
            raise ModelError(f"The checkpoint's config makes another model: {different[0]} is in one of them only")
        return Candidate(own, source, source, info, tasks, refused, plan)

    def _next_settings(self, lane: Lane, order: UpdateWeights) -> ModelSettings:
        """The lane's settings with the new path, which becomes its name unless another model has that."""
        old = lane.settings
        others = (other.served for other in self._lanes if other is not lane)
        taken = {name for served in others for name in (served.name, *served.aliases)}
        name = old.name if order.model_path in taken else order.model_path
        return msgspec.structs.replace(
            old,
            model_path=order.model_path,
            revision=None,
            tokenizer_path=old.tokenizer_path or old.reference,
            served_model_name=None if name == order.model_path else name,
            served_model_aliases=remembered((*old.served_model_aliases, old.name), name),
            task=tuple(lane.stages),
            weight_version=lane.served.weight_version if order.weight_version is None else order.weight_version,
        )


def check_counts(config: dict[str, Any], current: dict[str, Any]) -> None:
    """ModelError for other numbers of layers or experts, before as many modules are made of a damaged config."""
    for table in ("", "text_config"):
        mine, theirs = (each.get(table) or {} if table else each for each in (config, current))
        for name in COUNTS:
            new, old = mine.get(name), theirs.get(name)
            if new != old and (old is not None or (isinstance(new, int) and new > MANY)):
                raise ModelError(f"The checkpoint's config makes another model: {name} is {new}, not {old}")
        labels = mine.get("num_labels")
        if isinstance(labels, int) and labels > MANY:
            raise ModelError(f"The checkpoint's config has {labels} labels; at most {MANY} are taken")


def remembered(names: Iterable[str], current: str) -> tuple[str, ...]:
    """The former names that still mean a model: the first ones, which clients were set up with, and the latest."""
    former = [name for name in dict.fromkeys(names) if name != current]
    return tuple(former if len(former) <= 2 * REMEMBERED else former[:REMEMBERED] + former[-REMEMBERED:])


def find(host: Host, reference: str, allowed: str | None) -> ModelSource:
    """The checkpoint's folder. Refusal, worded as for a repository that doesn't exist, when there is none,
    and for one outside the folder ``allowed``."""
    try:
        if not reference:  # which pathlib takes for the working folder
            raise ModelError("The path is empty")
        if allowed is None:
            return host.resolve_model(reference)
        root, folder = Path(allowed).expanduser().resolve(), Path(reference).expanduser()
        # What isn't below the folder isn't even looked for, so that nobody learns what there is.
        if folder.resolve().is_relative_to(root) and folder.is_dir() and _stays(folder, root):
            return host.resolve_model(reference)
        log.warning("the weights %r are not below --allow-weights-dir %s", reference, allowed)
    except (TrunklineError, OSError, ValueError, RuntimeError) as error:
        log.warning("no weights at %r: %s", reference, error)
    raise Refusal(NOT_FOUND.format(reference))


def _stays(folder: Path, root: Path) -> bool:
    """Do all files lie below ``root``, wherever links lead?"""
    return all(path.resolve().is_relative_to(root) for path in folder.rglob("*"))
