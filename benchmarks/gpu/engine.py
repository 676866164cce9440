"""The whole engine against the floor: what the bytes and products of a pass take at the measured rates of this GPU."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu import models
from gpu.context import Context
from gpu.driver import Driver, Outcome, Turn
from gpu.floor import Floor
from trunkline.plugins.embedding.schemas import EmbeddingParams
from trunkline.plugins.generation.schemas import GenerationParams

MILLI = 1e3
STREAMING_GOAL = 1.25  # times the floor, of decoding one row of a dense 8B model
HOST_GOAL = 0.25e-3  # seconds per step
VARIANTS = ((True, True), (False, True), (True, False), (False, False))  # CUDA graphs, overlap
SETTLED = 3  # first steps of a batch that don't count
SHARE = 0.6  # of the GPU's memory, for weights
LEAST_LAYERS = 4


class Notes(logging.Handler):
    """Reports the project's warnings: graphs that couldn't be captured, kernels compiled while serving."""

    def __init__(self, context: Context) -> None:
        super().__init__(logging.WARNING)
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        self._context.record({"note": f"Logged: {record.getMessage()}"})


def dense(context: Context) -> None:
    """A dense decoder with the sizes of Llama 3 8B, with fewer layers on a small GPU."""
    _generation(context, "LlamaForCausalLM", models.LLAMA_8B, is_goal=True)


def mixture(context: Context) -> None:
    """A mixture of experts with the sizes of Qwen3-30B-A3B, with at most 24 of its layers."""
    _generation(context, "Qwen3MoeForCausalLM", models.QWEN3_30B_A3B | {"num_hidden_layers": 24}, is_goal=False)


def embedding(context: Context) -> None:
    """An encoder with the sizes of BERT large."""
    driver = _start(context, "BertModel", models.BERT_LARGE)
    for count, length in context.pick(((256, 512), (256, 64), (1, 64)), ((2, 8),)):
        context.attempt(f"{count} texts of {length} tokens", _embed, driver, count, length)


def _generation(context: Context, architecture: str, sizes: dict[str, Any], *, is_goal: bool) -> None:
    driver = _start(context, architecture, sizes)
    whole = driver.lane.candidate is not None and driver.lane.candidate.info.config["num_hidden_layers"] == 32
    batches = context.pick((1, 64), (1, 3))
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for graphs, overlap in context.pick(VARIANTS, VARIANTS[::3]):
        work += [(_decode, (driver, batch, graphs, overlap, is_goal and whole)) for batch in batches]
    work[2:2] = [(_prefill, (driver,)), (_shared_prefix, (driver,)), (_agreement, (driver,))]
    for measure, arguments in work:
        context.attempt(f"{measure.__name__[1:]} {arguments[1:]}", measure, *arguments)


def _start(context: Context, architecture: str, sizes: dict[str, Any]) -> Driver:
    """Start the engine, and report what it serves."""
    logging.getLogger("trunkline").addHandler(Notes(context))
    dtype = context.pick(torch.bfloat16, torch.float32)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_running_requests": 64, "max_total_tokens": 1 << 16}
    if context.dry:
        sizes = models.TINY
        options |= {"device": "cpu", "attention_backend": "triton", "threads": 1, "max_total_tokens": 512}
    else:
        sizes = _fitting(sizes)
    if architecture.startswith("Bert"):
        options |= {"task": ("embedding",), "max_running_requests": 256}
    with tempfile.TemporaryDirectory() as folder:
        models.write_config(Path(folder), architecture, sizes, dtype)
        driver = Driver(Path(folder), models, dtype=str(dtype).removeprefix("torch."), **options)
    served, plan = driver.lane.served, Floor(context, driver.lane).plan
    context.row(
        "Served",
        architecture=architecture,
        layers=sizes["num_hidden_layers"],
        weights_GB=plan.weight_bytes / 1e9,
        backend=served.attention_backend,
        fused=served.fused,
        **{f"{name} s": seconds for name, seconds in driver.start_seconds.items()},
    )
    return driver


def _fitting(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes with as many layers as fit into the GPU."""
    hidden, inner = sizes["hidden_size"], sizes.get("moe_intermediate_size", sizes["intermediate_size"])
    layer_bytes = 2 * (3 * hidden * inner * sizes.get("num_experts", 1) + 4 * hidden * hidden)
    _, total = torch.cuda.mem_get_info()
    layers = int((SHARE * total - 4 * sizes["vocab_size"] * hidden) / layer_bytes)
    return sizes | {"num_hidden_layers": max(LEAST_LAYERS, min(sizes["num_hidden_layers"], layers))}


def _prompts(driver: Driver, count: int, length: int) -> list[list[int]]:
    """Random ids, different in each call."""
    random = np.random.default_rng()
    return [list(map(int, random.integers(4, driver.lane.served.info.vocab_size, length))) for _ in range(count)]


def _params(new_tokens: int) -> GenerationParams:
    return GenerationParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)


def _seconds(outcome: Outcome) -> float:
    """From the arrival of the requests to the last result."""
    return sum(turn.seconds for turn in outcome.turns)


def steps_of(turns: list[Turn], batch: int) -> list[Turn]:
    """The turns in which each of ``batch`` requests got a token, without the first and last ones."""
    steps = [turn for turn in turns if turn.tokens == batch]
    return steps[SETTLED:-1] or steps


def _decode(context: Context, driver: Driver, batch: int, graphs: bool, overlap: bool, is_goal: bool) -> None:
    """Steps in which all requests decode."""
    prompt, new = context.pick((512, 100), (8, 3))
    driver.choose(graphs=graphs, overlap=overlap)
    driver.run("generation", _prompts(driver, batch, prompt), _params(2))  # warms up
    steps = steps_of(driver.run("generation", _prompts(driver, batch, prompt), _params(new)).turns, batch)
    seconds = statistics.median(turn.seconds for turn in steps)
    host = statistics.median(turn.host for turn in steps)
    least = Floor(context, driver.lane).decode(batch, prompt + new / 2)
    both = graphs and overlap
    context.row(
        "Decoding: milliseconds per step",
        requests=batch,
        context=prompt + new // 2,
        graphs=_word(graphs),
        overlap=_word(overlap),
        measured=seconds * MILLI,
        floor=least * MILLI,
        measured_per_floor=seconds / least,
        goal=STREAMING_GOAL if is_goal and both and batch == 1 else None,
        reached=seconds / least <= STREAMING_GOAL if is_goal and both and batch == 1 else None,
        host=host * MILLI,
        host_goal=HOST_GOAL * MILLI if both else None,
        host_reached=host <= HOST_GOAL if both and not context.dry else None,
        tokens_per_s=batch / seconds,
        steps=len(steps),
    )


def _agreement(context: Context, driver: Driver) -> None:
    """Greedy tokens of the same prompts in all variants. With random weights, many logits are nearly equal, so that
    graphs, whose attention may be split in another way, may change tokens; overlap must not."""
    prompts, params = _prompts(driver, *context.pick((8, 64), (2, 5))), _params(context.pick(16, 2))
    tokens: dict[tuple[bool, bool], list[int]] = {}
    for graphs, overlap in VARIANTS:
        driver.choose(graphs=graphs, overlap=overlap)
        driver.lane.flush()
        tokens[graphs, overlap] = [one for row in driver.run("generation", prompts, params).tokens for one in row]
    for name, pair, bound in (
        ("overlap on and off, with graphs", ((True, True), (True, False)), 1.0),
        ("overlap on and off, without graphs", ((False, True), (False, False)), 1.0),
        ("graphs on and off", ((True, False), (False, False)), None),
    ):
        same = statistics.mean(one == other for one, other in zip(tokens[pair[0]], tokens[pair[1]], strict=True))
        within = None if bound is None else same >= bound
        context.row("Equal greedy tokens", variants=name, share=float(same), bound=bound, within_bound=within)


def _word(on: bool) -> str:
    return "on" if on else "off"


def _prefill(context: Context, driver: Driver) -> None:
    """One prompt, to its first token."""
    length = context.pick(4096, 24)
    driver.choose(graphs=True, overlap=True)
    times = []
    for _ in range(context.pick(6, 2)):
        times.append(_seconds(driver.run("generation", _prompts(driver, 1, length), _params(1))))
    least = Floor(context, driver.lane).prompt(length)
    _prompt_row(context, f"1 prompt of {length} tokens", statistics.median(times[1:]), least, length)


def _shared_prefix(context: Context, driver: Driver) -> None:
    """Requests with a long common prefix, which is cached when they arrive."""
    count, shared, own, new = context.pick((64, 4096, 32, 32), (3, 20, 4, 2))
    driver.choose(graphs=True, overlap=True)
    seconds, cached = 0.0, 0
    for _ in range(2):  # the first time, kernels and graphs are used for the first time
        (prefix,) = _prompts(driver, 1, shared)
        driver.run("generation", [prefix], _params(1))
        prompts = [prefix + rest for rest in _prompts(driver, count, own)]
        outcome = driver.run("generation", prompts, _params(new))
        seconds, cached = _seconds(outcome), outcome.cached
    floor = Floor(context, driver.lane)
    least = floor.prompt(count * own) + sum(floor.decode(count, shared + own + step) for step in range(1, new))
    scenario = f"{count} x (shared {shared} + own {own} tokens), {new} new"
    _prompt_row(context, scenario, seconds, least, count * (own + new), cached_tokens=cached)


def _embed(context: Context, driver: Driver, count: int, length: int) -> None:
    """Texts of one length."""
    times = []
    for _ in range(context.pick(4, 2)):
        times.append(_seconds(driver.run("embedding", _prompts(driver, count, length), EmbeddingParams())))
    floor = Floor(context, driver.lane)
    least = max(sum(floor.prompt(length) for _ in range(count)), floor.weights(count) / context.bandwidth)
    _prompt_row(context, f"{count} texts of {length} tokens", statistics.median(times[1:]), least, count * length)


def _prompt_row(context: Context, scenario: str, seconds: float, least: float, tokens: int, **others: Any) -> None:
    context.row(
        "Prompts: milliseconds in all",
        scenario=scenario,
        measured=seconds * MILLI,
        floor=least * MILLI,
        measured_per_floor=seconds / least,
        tokens_per_s=tokens / seconds,
        **others,
    )
