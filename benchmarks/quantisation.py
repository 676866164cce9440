"""What ``--quantization`` costs and saves: perplexity, vectors, memory and speed, beside OpenVINO GenAI.

    python benchmarks/quantisation.py [--openvino PYTHON] [--model random:llama-1b] [--speed | --accuracy]

The servers of all formats run in turns; OpenVINO runs in a process of its own, without HTTP. PYTHON is the interpreter
of an environment with ``openvino-genai`` and ``optimum-intel[openvino]``, which also converts the model. The text for
the perplexity is the Python manual that comes with every interpreter (``pydoc_data``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import msgspec
import torch
from bench_serving import flush, run
from checkpoints import LLAMA_1B, folder_of
from scenarios import Scenario, build
from server import running

from trunkline.core import Engine
from trunkline.core.engine.control.pages import tensors_of
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.kernels.cpu.processor import has_bfloat16
from trunkline.plugins.embedding.offline import encode

SMOLLM, MINILM = "demo:smollm2-135m-instruct", "demo:all-minilm-l6-v2"
FORMATS = ("plain", "int8", "int4")
ROW, ROWS = 512, 16  # tokens of a row of text, and rows
TOPICS = ("types", "typesseq", "assignment", "class", "exceptions", "operator-summary", "for", "function")
EXPORTED = Path(os.environ.get("TRUNKLINE_CACHE", "~/.cache/trunkline")).expanduser() / "benchmarks" / "openvino"
WEIGHTS = {"int8": (), "int4": ("--group-size", "64")}  # options of optimum's export


def flags_of(kind: str) -> list[str]:
    return [] if kind == "plain" else ["--quantization", kind]


# -- accuracy and memory -------------------------------------------------------------------------


@torch.inference_mode()
def perplexity(model: LoadedModel, rows: Sequence[Sequence[int]]) -> float:
    """Of rows of token ids; each is read on its own."""
    total = 0.0
    for row in rows:
        ids = torch.tensor(row)
        hidden = model.forward(ids, torch.arange(len(ids)), packed_layout([len(ids)]), None)
        logits = model.heads["lm"](hidden[:-1]).float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return math.exp(total / sum(len(row) - 1 for row in rows))


def resident(model: LoadedModel) -> int:
    """Bytes of all tensors of a model, packed copies included."""
    parts = [child for child in model.whole.children() if child is not model.backbone] + [*model.backbone.children()]
    storages = [tensor.untyped_storage() for tensor in tensors_of(parts)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def accuracy(model: str, dtype: str, options: argparse.Namespace) -> None:
    """A row for each format of a generating model."""
    print(f"\n| {model} in {dtype} | perplexity | ÷ plain | weights MB | ÷ plain |\n| --- | --- | --- | --- | --- |")
    rows: list[list[int]] = []
    first: tuple[float, int] | None = None
    for kind in FORMATS:
        extra: dict[str, Any] = {} if kind == "plain" else {"quantization": kind}
        with Engine(str(folder_of(model)), dtype=dtype, threads=options.threads, **extra) as engine:
            transport: Any = engine.client.transport
            loaded = transport.loop.lanes[0].model
            ids = loaded.tokenizer.encode("\n\n".join(topics[name] for name in TOPICS))
            rows = [ids[start : start + ROW] for start in range(0, ROW * ROWS, ROW)]
            found = perplexity(loaded, rows), resident(loaded)
        first = first or found
        ratios = [a / b for a, b in zip(found, first, strict=True)]
        print(f"| {kind} | {found[0]:.3f} | {ratios[0]:.4f} | {found[1] / 1e6:.0f} | {ratios[1]:.2f} |", flush=True)
    if options.openvino is not None and first is not None:
        for kind in WEIGHTS:
            with worker(options.openvino, exported(options.openvino, model, kind), options.threads) as pipe:
                found_there = pipe.ask({"rows": rows})
            print(f"| OpenVINO {kind} | {found_there:.3f} | {found_there / first[0]:.4f} | | |")


def vectors(dtype: str, threads: int) -> None:
    """How near the vectors of texts are to those without quantisation."""
    texts = [line.strip() for name in TOPICS for line in topics[name].split("\n\n") if len(line) > 80][:200]
    made: dict[str, Any] = {}
    for kind in FORMATS:
        extra: dict[str, Any] = {} if kind == "plain" else {"quantization": kind}
        with Engine(str(folder_of(MINILM)), dtype=dtype, threads=threads, **extra) as engine:
            made[kind] = encode(engine, texts, truncate="end")
    print(f"\n| {MINILM} in {dtype}, {len(texts)} texts | least cosine | mean |\n| --- | --- | --- |")
    for kind in FORMATS[1:]:
        near = (made["plain"] * made[kind]).sum(1)
        print(f"| {kind} | {near.min():.5f} | {near.mean():.5f} |")


# -- OpenVINO ------------------------------------------------------------------------------------


class Pipe:
    """openvino_worker.py in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._stdout.readline()  # "ready"

    def ask(self, question: Any) -> float:
        """The worker's number. RuntimeError when it has died."""
        self._stdin.write(json.dumps(question) + "\n")
        self._stdin.flush()
        line = self._stdout.readline()
        if not line:
            raise RuntimeError("the worker of OpenVINO died; its output is above")
        return float(json.loads(line))


@contextmanager
def worker(python: Path, folder: Path, threads: int) -> Iterator[Pipe]:
    command = [str(python), str(Path(__file__).with_name("openvino_worker.py")), str(folder), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Pipe(process)
        finally:
            process.kill()


def exported(python: Path, model: str, kind: str) -> Path:
    """The folder of the model as OpenVINO reads it; converts it once."""
    target = EXPORTED / f"{model.replace(':', '-')}-{kind}"
    if not target.exists():
        command = [str(python.with_name("optimum-cli")), "export", "openvino", "--task", "text-generation-with-past"]
        command += ["--model", str(folder_of(model)), "--weight-format", kind, *WEIGHTS[kind], str(target)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    return target


# -- speed ---------------------------------------------------------------------------------------


async def speed(model: str, dtype: str, options: argparse.Namespace) -> None:
    """A row for each scenario: medians of seconds of all formats, measured in turns."""
    seconds: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        sides: dict[str, Any] = {}
        common = ["--dtype", dtype, "--threads", str(options.threads), "--max-total-tokens", "24576"]
        for kind in FORMATS:
            url = await stack.enter_async_context(running(str(folder_of(model)), [*common, *flags_of(kind)]))
            sides[kind] = url
        if options.openvino is not None:
            for kind in WEIGHTS:
                folder = exported(options.openvino, model, kind)
                sides[f"OpenVINO {kind}"] = stack.enter_context(worker(options.openvino, folder, options.threads))
        for round_ in range(options.rounds + 1):  # round 0 warms up
            scenarios = build(round_, scale=options.scale if round_ else options.scale / 8)[:3]
            for scenario in scenarios:
                names = list(sides)
                turns = names[round_ % len(names) :] + names[: round_ % len(names)]
                for name in turns:
                    took = await one(sides[name], scenario)
                    if round_:
                        seconds.setdefault(scenario.name, {}).setdefault(name, []).append(took)
    names = list(next(iter(seconds.values())))
    print(f"\n| {model} in {dtype}, s | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for scenario_name, by_side in seconds.items():
        print(f"| {scenario_name} | {' | '.join(f'{statistics.median(by_side[name]):.2f}' for name in names)} |")
    pairs = [("plain", kind) for kind in FORMATS[1:]]
    pairs += [(f"OpenVINO {kind}", kind) for kind in WEIGHTS if f"OpenVINO {kind}" in names] + [("int8", "int4")]
    print(f"\n| ratio | {' | '.join(seconds)} |\n|{' --- |' * (len(seconds) + 1)}")
    for slow, fast in pairs:
        ratios = [
            statistics.median(a / b for a, b in zip(by_side[slow], by_side[fast], strict=True))
            for by_side in seconds.values()
        ]
        print(f"| {slow} ÷ {fast} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


async def one(side: str | Pipe, scenario: Scenario) -> float:
    """The seconds of one run."""
    if isinstance(side, Pipe):
        return await asyncio.to_thread(side.ask, msgspec.to_builtins(scenario))
    await flush(side)
    return (await run(side, scenario)).wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help=f"default: {SMOLLM} and {LLAMA_1B}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 where the CPU has it")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="interpreter of an environment with OpenVINO")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side; default all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths, for a trial run")
    parser.add_argument("--accuracy", action="store_true", help="only perplexity, vectors and memory")
    parser.add_argument("--speed", action="store_true", help="only speed")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    print(f"{options.threads} threads, lengths × {options.scale}, medians of {options.rounds} rounds", end=", ")
    print(f"load at the start {os.getloadavg()[0]:.1f}")
    for model in options.model or [SMOLLM, LLAMA_1B]:
        if not options.speed:
            accuracy(model, dtype, options)
        if not options.accuracy:
            asyncio.run(speed(model, dtype, options))
    if not options.speed:
        vectors(dtype, options.threads)


if __name__ == "__main__":
    main()
