"""What requests with grammars cost the others: the latency between tokens of requests without one.

``python benchmarks/structured_output.py [MODEL]`` runs the engine in this process. Some requests without grammar
decode all the time, and their times between tokens are measured. Beside them, as many others come and go: without a
grammar, with ordinary grammars, or with hostile ones, in turns. Each other request has a new grammar, so that all are
compiled. It prints the ratios of the latencies to those without grammars, and the times of compilations and masks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.core.types import Submission
from trunkline.plugins.generation.grammar.compiler import GrammarCompiler
from trunkline.plugins.generation.grammar.state import GrammarState
from trunkline.plugins.generation.schemas import GenerationParams, Grammar

MEASURED = 4  # requests without grammar whose latencies are measured
OTHERS = 4  # at a time
NEW = 40  # tokens of one of the others
Make = Callable[[int], Grammar | None]


def ordinary(number: int) -> Grammar:
    """Schemas as clients send them; ``number`` makes them different."""
    properties = {
        f"name{number}": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return Grammar("json_schema", json.dumps(schema))


def hostile(number: int) -> Grammar:
    """Grammars that are slow to compile, or whose masks are slow."""
    name = f"n{number}"
    doubling = "".join(f'a{i} ::= a{i + 1} a{i + 1} | "x"\n' for i in range(900))
    chosen: list[Grammar] = [
        Grammar("json_schema", json.dumps({"properties": {f"{name}p{i}": {"type": "integer"} for i in range(3000)}})),
        Grammar("json_schema", json.dumps({"type": "object", "required": [f"{name}r{i}" for i in range(5000)]})),
        Grammar("json_schema", json.dumps({"const": name + "a" * 8000})),
        Grammar("json_schema", json.dumps(chain(2000 + number))),
        Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 99991 + number})),
        Grammar("regex", f"{name}" + "ab" * 4000),
        Grammar("regex", f"{name}?" + "(?:" * 100 + "a" + "{2})" * 100),
        Grammar("regex", f"{name}?[a-z ]*[aeiou][a-z ]{{14}}x"),
        Grammar("ebnf", f'root ::= root root | root root root | "a" | "{name}"'),
        Grammar("ebnf", "root ::= " + " | ".join(f'"{name}{i}"' for i in range(4000))),
        Grammar("ebnf", f'root ::= "{name}"? a0\n{doubling}a900 ::= "x"'),
        Grammar("json_schema", json.dumps({"title": name, "allOf": [ends_of(count) for count in range(10, 30)]})),
    ]
    return chosen[number % len(chosen)]


def chain(length: int) -> dict[str, Any]:
    references = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**references, f"a{length}": {"type": "string"}}}


def ends_of(count: int) -> dict[str, Any]:
    """Its automaton has 2^count states."""
    return {"type": "string", "pattern": f"(a|b)*a(a|b){{{count}}}$"}


KINDS: dict[str, Make] = {"none": lambda number: None, "ordinary": ordinary, "hostile": hostile}


class Load:
    """Requests of one kind that come and go, from ``OTHERS`` threads, until :meth:`stop`."""

    def __init__(self, engine: Engine, make: Make, first: int) -> None:
        self._engine, self._make = engine, make
        self._stopped = threading.Event()
        self.refused = self.completed = 0
        self._threads = [
            threading.Thread(target=self._run, args=(range(first + place, 1 << 30, OTHERS),)) for place in range(OTHERS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if self._stopped.is_set():
                return
            params = GenerationParams(max_new_tokens=NEW, seed=number, grammar=self._make(number))
            item = Submission(prompt=[5 + number % 100, 7, 9, 11], params=params, rid=uuid.uuid4().hex)
            (ticket,) = self._engine.submit_all("generation", [item])
            try:
                ticket.result(timeout=600)
                self.completed += 1
            except RequestError:
                self.refused += 1

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def gaps(engine: Engine, tokens: int) -> list[float]:
    """Seconds between the tokens of each measured request."""
    draw = random.Random(0)
    items = [
        Submission(
            prompt=[draw.randrange(5, 300) for _ in range(32)],
            params=GenerationParams(max_new_tokens=tokens, ignore_eos=True, seed=index),
            rid=uuid.uuid4().hex,
        )
        for index in range(MEASURED)
    ]
    times: list[list[float]] = [[] for _ in items]

    def read(index: int, stream: Iterator[int]) -> None:
        times[index] = [time.perf_counter() for _ in stream]

    tickets = engine.submit_all("generation", items)
    readers = [threading.Thread(target=read, args=(i, iter(ticket))) for i, ticket in enumerate(tickets)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return [gap for each in times for gap in np.diff(each)]


def watch() -> dict[str, list[float]]:
    """Lists to which the seconds of compilations and of masks (CPU time) are appended from now on."""
    found: dict[str, list[float]] = {"compile": [], "mask": []}
    compile_one, advance = GrammarCompiler._compile, GrammarState.advance

    def compiled(self: GrammarCompiler, grammar: Grammar, *, quick: bool) -> Any:
        began = time.perf_counter()
        outcome = compile_one(self, grammar, quick=quick)
        found["compile"].append(time.perf_counter() - began)
        return outcome

    def advanced(self: GrammarState) -> None:
        began = time.thread_time()
        advance(self)
        found["mask"].append(time.thread_time() - began)

    GrammarCompiler._compile = compiled  # type: ignore[method-assign]
    GrammarState.advance = advanced  # type: ignore[method-assign]
    return found


def summary(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, high, top = statistics.median(values), float(np.quantile(values, 0.99)), max(values)
    return f"{len(values)} calls, median {middle * 1e3:.3f}, p99 {high * 1e3:.2f}, largest {top * 1e3:.1f} ms"


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=150, help="of each measured request and round")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    times = {kind: {"compile": [], "mask": []} for kind in KINDS}  # type: dict[str, dict[str, list[float]]]
    with Engine(options.model) as engine:
        gaps(engine, 20)
        seconds = watch()
        number = 0
        for turn in range(options.rounds):
            for kind in (*list(KINDS)[turn % 3 :], *list(KINDS)[: turn % 3]):
                before = {name: len(values) for name, values in seconds.items()}
                load = Load(engine, KINDS[kind], number)
                time.sleep(1.0)
                found[kind] += gaps(engine, options.tokens)
                load.stop()
                number += 1000
                for name, values in seconds.items():
                    times[kind][name] += values[before[name] :]
                print(f"{kind}: {load.completed} others completed, {load.refused} refused", flush=True)
    base = found["none"]
    for kind, values in found.items():
        ratios = [float(np.quantile(values, q) / np.quantile(base, q)) for q in (0.5, 0.99)]
        p99 = float(np.quantile(values, 0.99))
        print(f"{kind:9} p99 {p99 * 1e3:6.1f} ms; ratio of medians {ratios[0]:.2f}, of p99 {ratios[1]:.2f}")
        for name, measured in times[kind].items():
            print(f"  {name}: {summary(measured)}")


if __name__ == "__main__":
    main()
