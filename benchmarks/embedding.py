"""512 sentences of 8 to 256 tokens: trunkline, offline and over HTTP, against sentence-transformers.

With ``--infinity PYTHON``, an interpreter that has infinity-emb, against Infinity's torch engine too.
``python benchmarks/embedding.py [MODEL]`` starts every side in a process of its own with equally
many threads and runs them in turns, so that all meet the same neighbours. Rates are sentences a
second, ratios medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
from http_client import Connection
from numpy.typing import NDArray
from server import running
from tokenizers import Tokenizer

from trunkline.core.model.sources import DEMO
from trunkline.core.model.sources.catalogue import fetch
from trunkline.kernels.cpu.processor import has_bfloat16

Array = NDArray[np.float32]
TRUNKLINE, LIBRARY, INFINITY = "trunkline", "sentence-transformers", "infinity"


class Run(msgspec.Struct):
    """One pass over all sentences. ``vectors``: float32, joined."""

    wall: float  # seconds
    vectors: bytes

    def array(self, count: int) -> Array:
        return np.frombuffer(self.vectors, np.float32).reshape(count, -1)


def sentences(folder: Path, count: int, low: int, high: int, seed: int) -> list[str]:
    """Random words that are one token each; with special tokens ``low`` to ``high`` tokens, evenly spread."""
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(low, high) - 2)) for _ in range(count)]


# -- workers: one side in a process of its own ------------------------------------------------


def library_side(folder: str, dtype: str) -> Callable[[list[str]], Array]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    return lambda texts: model.encode(texts, batch_size=32, convert_to_numpy=True).astype(np.float32)


def trunkline_side(folder: str, dtype: str) -> Callable[[list[str]], Array]:
    from trunkline.core import Engine
    from trunkline.plugins.embedding.offline import encode

    engine = Engine(folder, dtype=dtype, threads=torch.get_num_threads())
    return lambda texts: encode(engine, texts, truncate="end")


def work(kind: str, folder: str, dtype: str) -> None:
    """Answer lists of texts on stdin with runs on stdout, one JSON line each, until end of file."""
    compute = (library_side if kind == LIBRARY else trunkline_side)(folder, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        texts = msgspec.json.decode(line, type=list[str])
        start = time.perf_counter()
        vectors = compute(texts)
        run = Run(time.perf_counter() - start, vectors.tobytes())
        print(msgspec.json.encode(run).decode(), flush=True)


class Worker:
    """:func:`work`, seen from here."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._line()  # "ready"

    def run(self, texts: list[str]) -> Run:
        self._stdin.write(msgspec.json.encode(texts).decode() + "\n")
        self._stdin.flush()
        return msgspec.json.decode(self._line(), type=Run)

    def _line(self) -> str:
        line = self._stdout.readline()
        if not line:
            raise RuntimeError("a worker died; its output is above")
        return line


@contextmanager
def worker(kind: str, folder: Path, dtype: str, threads: int, python: str = sys.executable) -> Iterator[Worker]:
    command = [python, __file__, str(folder), "--worker", kind, "--dtype", dtype]
    if kind == INFINITY:
        command = [python, str(Path(__file__).with_name("infinity_worker.py")), str(folder), dtype]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    # Waits are short on every side, as trunkline's server has them: idle workers must not spin.
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "20000"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


# -- over HTTP -------------------------------------------------------------------------------


class _Record(msgspec.Struct):
    embedding: list[float]


async def over_http(base_url: str, texts: Sequence[str], clients: int) -> Run:
    """One request per text; each client sends the next one when it has the reply to its last."""
    found: list[list[float]] = [[]] * len(texts)
    left = iter(range(len(texts)))
    decode = msgspec.json.Decoder(_Record).decode

    async def client() -> None:
        connection = Connection(base_url)
        for index in left:
            status, body = await connection.request("POST", "/encode", {"text": texts[index], "truncate": "end"})
            if status != 200:
                raise RuntimeError(f"/encode answered {status}: {body[:500].decode(errors='replace')}")
            found[index] = decode(body).embedding
        await connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Run(time.perf_counter() - start, np.array(found, np.float32).tobytes())


# -- what the host does for a request ---------------------------------------------------------


def host_costs(folder: Path, texts: list[str], vector: Array) -> dict[str, float]:
    """Microseconds for one request: the front's work besides HTTP itself."""
    from transformers import AutoTokenizer

    from trunkline.plugins.embedding.body_schemas import EncodeBody

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bodies = [msgspec.json.encode({"text": text}) for text in texts]
    coded = vector.tobytes()

    def write() -> bytes:
        return msgspec.json.encode({"embedding": np.frombuffer(coded, "<f4").tolist()})

    return {
        "reading JSON": _each(lambda i: msgspec.json.decode(bodies[i], type=EncodeBody), len(texts)),
        "tokenising": _each(lambda i: tokenizer.encode(texts[i], truncation=True, max_length=256), len(texts)),
        "writing JSON": _each(lambda _: write(), len(texts)),
    }


def _each(call: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    for index in range(count):
        call(index)
    return (time.perf_counter() - start) / count * 1e6


# -- the table -------------------------------------------------------------------------------


async def measure(options: argparse.Namespace, folder: Path, texts: list[str]) -> dict[str, list[Run]]:
    """Runs by side, one a round."""
    flags = ["--dtype", options.dtype, "--threads", str(options.threads)]
    runs: dict[str, list[Run]] = {}
    with ExitStack() as stack:

        def start(kind: str, dtype: str) -> Worker:
            return stack.enter_context(worker(kind, folder, dtype, options.threads))

        workers = {f"{TRUNKLINE} {options.dtype}, offline": start(TRUNKLINE, options.dtype)}
        workers |= {f"{LIBRARY} {dtype}": start(LIBRARY, dtype) for dtype in ("bfloat16", "float32")}
        if options.infinity:
            peer = worker(INFINITY, folder, "float32", options.threads, options.infinity)
            workers[f"{INFINITY} float32"] = stack.enter_context(peer)
        async with running(str(folder), flags) as base_url:
            http = f"{TRUNKLINE} {options.dtype}, {options.clients} clients"
            for number in range(options.rounds + 1):
                part = texts[:64] if number == 0 else texts  # round 0 warms up
                found = {name: await asyncio.to_thread(each.run, part) for name, each in workers.items()}
                found[http] = await over_http(base_url, part, options.clients)
                if number:
                    for name, run in found.items():
                        runs.setdefault(name, []).append(run)
                    rates = ", ".join(f"{name}: {len(texts) / run.wall:.0f}/s" for name, run in found.items())
                    print(f"round {number}: {rates}", flush=True)
    return runs


def report(runs: dict[str, list[Run]], count: int) -> None:
    """One line a side: rate, ratios of wall times, and the smallest cosine to the library in float32."""
    truth = runs[f"{LIBRARY} float32"][0].array(count)
    print(f"\n{'':36s}{'sentences/s':>12s}{'× ST bf16':>11s}{'× ST fp32':>11s}{'cosine ≥':>11s}")
    for name, own in runs.items():
        rate = count / statistics.median(run.wall for run in own)
        cells = ""
        for dtype in ("bfloat16", "float32"):
            other = runs[f"{LIBRARY} {dtype}"]
            ratio = statistics.median(theirs.wall / mine.wall for mine, theirs in zip(own, other, strict=True))
            cells += f"{ratio:11.2f}"
        vectors = own[0].array(count)
        cosines = (vectors * truth).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(truth, axis=1)
        print(f"{name:36s}{rate:12.0f}{cells}{cosines.min():11.5f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:all-minilm-l6-v2", help="demo:NAME or a local folder")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="trunkline's; default bfloat16 if the CPU has it"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side; default all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--infinity", metavar="PYTHON", help="an interpreter with infinity-emb, as one more peer")
    parser.add_argument("--worker", choices=[TRUNKLINE, LIBRARY], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if has_bfloat16() else "float32")
    if options.worker:
        work(options.worker, options.model, options.dtype)
        return
    folder = fetch(options.model) if options.model.startswith(DEMO) else Path(options.model)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"The machine is busy (load {load:.1f}): times will be worse than it could, ratios unsteady.")
    texts = sentences(folder, options.sentences, 8, 256, seed=1)
    runs = await measure(options, folder, texts)
    print(f"\n{options.model}, {len(texts)} sentences, {options.threads} threads, medians of {options.rounds} rounds")
    report(runs, len(texts))
    vector = next(iter(runs.values()))[0].array(len(texts))[0]
    costs = host_costs(folder, texts, vector)
    print("host, µs a request: " + ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items()))


if __name__ == "__main__":
    asyncio.run(main())
