"""Loads new weights for a lane while it still has its current ones, and checks that they fit the served model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from trunkline.core.config import Config
from trunkline.core.engine.candidates import Candidate, choose_tasks
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.memory import MemoryShare, gib
from trunkline.core.engine.messages import NOT_FOUND
from trunkline.core.engine.startup import assemble
from trunkline.core.engine.weight_update import WeightUpdate
from trunkline.core.errors import ModelError, TrunklineError
from trunkline.core.host import Host
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sizes.plan import plan_model
from trunkline.core.model.sources import weights
from trunkline.core.model.sources.info import EXPERTS, read_config, read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.types import ModelSource, ServedModel

from .tensors import Tensors, merge, read_sent
from .update_arguments import UpdateArguments, UpdateRefused, UpdateTensors, UpdateWeights
from .updates import collect_garbage

log = logging.getLogger("trunkline.engine")

# Training may update a model thousands of times, each time with a new name.
MAX_ALIASES = 32  # of the first names, and as many of the latest
# Names of the config values that determine how many modules a class makes.
COUNT_KEYS = (
    *EXPERTS, "n_shared_experts", "num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers",
)  # fmt: skip
MAX_COUNT = 1 << 14  # for counts that the served model's config doesn't give
FORMATS = ("auto", "safetensors")


class UpdateLoader:
    """Loads new weights. It doesn't change the lane: :meth:`Lane.apply_update` does, with the result."""

    def __init__(self, lanes: Sequence[Lane], config: Config, host: Host) -> None:
        self._lanes = lanes
        self._config = config
        self._host = host

    def __call__(self, lane: Lane, arguments: UpdateArguments) -> WeightUpdate:
        """Load the weights that ``arguments`` describe. UpdateRefused, with the message for the client."""
        assert lane.candidate is not None  # set at start-up
        reference = arguments.model_path if isinstance(arguments, UpdateWeights) else lane.candidate.source.reference
        try:
            if isinstance(arguments, UpdateTensors):
                return self._load_sent(lane, lane.candidate, arguments)
            return self._load_folder(lane, lane.candidate, self._source(arguments), arguments)
        except UpdateRefused:
            raise
        except TrunklineError as error:
            reason = str(error).removeprefix(f"{reference} can't be loaded: ").rstrip(".")
        except BaseException as error:  # damaged checkpoints and plugins' hooks may raise anything, SystemExit too
            log.exception("weights for %s can't be loaded", reference)
            reason = f"{type(error).__name__}: {error}"
        collect_garbage()
        raise UpdateRefused(f"Failed to update weights: {reason}.\nRolling back to original weights.")

    def _source(self, arguments: UpdateWeights) -> ModelSource:
        """The checkpoint. UpdateRefused when it isn't found, or has no weights, or for an unknown load format."""
        if arguments.model_path.endswith(".gguf"):
            raise UpdateRefused(
                f"Failed to get weights iterator: {arguments.model_path} is a GGUF file; new weights come from folders "
                "with safetensors files."
            )
        source = find_checkpoint(self._host, arguments.model_path, self._config.engine.allow_weights_dir)
        if arguments.load_format not in (None, *FORMATS):
            raise UpdateRefused(
                f"Failed to get model loader: {arguments.load_format}. There are: {', '.join(FORMATS)}."
            )
        if weights.absent(source.path):
            raise UpdateRefused(
                f"Failed to get weights iterator: Cannot find any model weights with `{arguments.model_path}`."
            )
        return source

    def _load_folder(
        self, lane: Lane, served: Candidate, source: ModelSource, arguments: UpdateWeights
    ) -> WeightUpdate:
        assert lane.grant is not None
        return self._load(lane, self._examine(lane, served, lane.grant, source, arguments), None)

    def _load_sent(self, lane: Lane, candidate: Candidate, arguments: UpdateTensors) -> WeightUpdate:
        """The served model with some of its tensors replaced by those that a client sent."""
        if self._config.engine.allow_weights_dir is not None:
            raise ModelError(f"Weights come from below {self._config.engine.allow_weights_dir} (--allow-weights-dir)")
        stored = lane.model.stored or dict(self._host.weights(candidate.source))
        update = self._load(lane, candidate, merge(stored, read_sent(Path(arguments.path)), lane.model.whole))
        label = lane.served.weight_version if arguments.weight_version is None else arguments.weight_version
        return replace(update, served=msgspec.structs.replace(
            update.served, aliases=lane.served.aliases, weight_version=label, weights_sent=True
        ))  # fmt: skip

    def _load(self, lane: Lane, candidate: Candidate, tensors: Tensors | None) -> WeightUpdate:
        """Load the model, from ``tensors`` if given, else from its folder. ModelError when it doesn't fit the lane."""
        assert lane.grant is not None
        sizes = candidate.plan
        needed, free = max(sizes.weight_bytes, sizes.loading_bytes), lane.runner.device.memory().available
        if needed > free:
            raise ModelError(
                f"The new weights need {needed} bytes ({gib(needed)}) beside the old ones, "
                f"but {free} bytes ({gib(free)}) of memory are free"
            )
        settings = self._config.settings_of(candidate.settings)
        stored = None if tensors is None else tensors.items()
        served, model, stages = assemble(
            candidate, lane.grant, settings, self._host, lane.model.device, lane.model.tokenizer, stored, lane.model
        )
        served = msgspec.structs.replace(served, tokenizer_path=lane.served.tokenizer_path)
        try:
            _check_replacement(lane, served, model)
            runner = lane.runner.for_model(model, stages, model.expert_watch)
        except BaseException:
            for stage in stages.values():
                stage.close()
            raise
        return WeightUpdate(candidate, served, model, stages, runner)

    def _examine(
        self, lane: Lane, served: Candidate, grant: MemoryShare, source: ModelSource, arguments: UpdateWeights
    ) -> Candidate:
        """Examine a checkpoint by its config. ModelError unless its architecture and tensor shapes are those served."""
        settings, current = self._next_settings(lane, arguments), lane.model.info
        # Before transformers makes a config object, which allocates a list as long as some of these counts.
        check_counts(read_config(Path(source.path)), current.config)
        info = read_info(source, settings)
        if info.architecture != current.architecture:
            raise ModelError(f"The checkpoint is a {info.architecture}, the served model a {current.architecture}")
        if info.context_length < grant.context:
            raise ModelError(
                f"The checkpoint was made for {info.context_length} tokens, but {grant.context} are served"
            )
        tasks, refused = choose_tasks(settings, info, self._host.serves(info, self._config.settings_of(settings)))
        transforms = self._host.transforms(info, self._config.settings_of(settings))
        plan = plan_model(source, info, settings, lane.model.device).stored_as([one.value for one in transforms])
        for name, shape in served.plan.shapes.items():
            if name in plan.shapes and plan.shapes[name] != shape:
                raise ModelError(f"Attempted to load weight ({plan.shapes[name]}) into parameter ({shape}): {name}")
        if different := sorted(plan.shapes.keys() ^ served.plan.shapes.keys()):
            raise ModelError(f"The checkpoint's config makes another model: {different[0]} is in one of them only")
        chunk, backend = served.default_chunk, served.backend
        return Candidate(settings, source, source, info, tasks, refused, plan, chunk, backend, transforms)

    def _next_settings(self, lane: Lane, arguments: UpdateWeights) -> ModelSettings:
        """The lane's settings with the new path, which becomes the model's name unless another model has this name."""
        old = lane.settings
        others = (other.served for other in self._lanes if other is not lane)
        used_names = {name for served in others for name in (served.name, *served.aliases)}
        name = old.name if arguments.model_path in used_names else arguments.model_path
        return msgspec.structs.replace(
            old,
            model_path=arguments.model_path,
            revision=None,
            tokenizer_path=old.tokenizer_path or old.reference,
            served_model_name=None if name == arguments.model_path else name,
            served_model_aliases=limit_aliases((*old.served_model_aliases, old.name), name),
            task=tuple(lane.stages),
            weight_version=lane.served.weight_version if arguments.weight_version is None else arguments.weight_version,
        )


def _check_replacement(lane: Lane, served: ServedModel, model: LoadedModel) -> None:
    """ModelError when a loaded model can't take the place of the served one."""
    if missing := [task for task in lane.stages if task not in model.stages]:
        raise ModelError(f"The checkpoint doesn't serve {missing[0]}: {served.refused[missing[0]]}")
    if unused := sorted(model.unused - lane.model.unused):
        raise ModelError(
            f"The model has no place for {len(unused)} of the checkpoint's tensors, the first is {unused[0]}"
        )
    if model.kv_shapes != lane.model.kv_shapes or model.dtype != lane.model.dtype:
        raise ModelError("The checkpoint's keys and values have other shapes than the served model's")


def check_counts(config: dict[str, Any], current: dict[str, Any]) -> None:
    """ModelError when a checkpoint's config has other numbers of layers or experts than the served model's.

    This check comes before anything is built from the config, so that a damaged one can't exhaust the memory.
    """
    for table in ("", "text_config"):
        checked, served = (each.get(table) or {} if table else each for each in (config, current))
        for name in COUNT_KEYS:
            new, old = checked.get(name), served.get(name)
            if new != old and (old is not None or (isinstance(new, int) and new > MAX_COUNT)):
                raise ModelError(f"The checkpoint's config makes another model: {name} is {new}, not {old}")
        labels = checked.get("num_labels")
        if isinstance(labels, int) and labels > MAX_COUNT:
            raise ModelError(f"The checkpoint's config has {labels} labels; the limit is {MAX_COUNT}")


def limit_aliases(names: Iterable[str], current: str) -> tuple[str, ...]:
    """The former names that remain aliases of a model: the first ones, which clients are configured with, and the
    latest."""
    former = [name for name in dict.fromkeys(names) if name != current]
    return tuple(former if len(former) <= 2 * MAX_ALIASES else former[:MAX_ALIASES] + former[-MAX_ALIASES:])


def find_checkpoint(host: Host, reference: str, allowed: str | None) -> ModelSource:
    """Resolve a path or hub id; with ``allowed``, only a path below this folder.

    UpdateRefused, with the same message for one that isn't allowed as for one that doesn't exist.
    """
    try:
        if not reference:  # pathlib would take it for the working directory
            raise ModelError("The path is empty")
        if allowed is None:
            return host.resolve_model(reference)
        root, folder = Path(allowed).expanduser().resolve(), Path(reference).expanduser()
        # Other paths aren't opened, so that clients can't find out which of them exist.
        if folder.resolve().is_relative_to(root) and folder.is_dir() and _all_below(folder, root):
            return host.resolve_model(reference)
        log.warning("the weights %r are not below --allow-weights-dir %s", reference, allowed)
    except (TrunklineError, OSError, ValueError, RuntimeError) as error:
        log.warning("no weights at %r: %s", reference, error)
    raise UpdateRefused(NOT_FOUND.format(reference))


def _all_below(folder: Path, root: Path) -> bool:
    """Whether all files of ``folder`` are below ``root``, also when links are followed."""
    return all(path.resolve().is_relative_to(root) for path in folder.rglob("*"))
