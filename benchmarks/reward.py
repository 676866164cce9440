"""Scoring many answers to one prompt: what the radix cache saves.

``python benchmarks/reward.py`` makes a reward model of ``demo:smollm2-135m-instruct`` (its weights,
and a score head of random numbers: the scores mean nothing, the work is the same) and scores
``--answers`` texts that begin with the same prompt, with the cache and without it, and with
transformers in one padded batch. Prints the median seconds of ``--runs`` calls on an empty cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trunkline.core import Engine
from trunkline.core.host import Host
from trunkline.plugins.reward.offline import classify

DEMO = "demo:smollm2-135m-instruct"
SENTENCE = "The river bends twice before it meets the sea, and the old mill stands between the bends. "
ANSWER = " I would say that number {index} is the better one, because it says what was asked for and nothing else."


def make_model(folder: Path) -> None:
    """The demo model with a random score head, in bfloat16."""
    source = Host.load().resolve_model(DEMO).path
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts(tokenizer: AutoTokenizer, prompt_tokens: int, answers: int) -> list[str]:
    """One prompt of about ``prompt_tokens`` tokens with ``answers`` different ends."""
    length = len(tokenizer(SENTENCE)["input_ids"])
    prompt = SENTENCE * max(1, prompt_tokens // length)
    return [prompt + ANSWER.format(index=index) for index in range(answers)]


def timed(call: Callable[[], object], reset: Callable[[], object], runs: int) -> float:
    """Median seconds of ``call``, after one that isn't counted; ``reset`` runs before each."""
    seconds = []
    for run in range(runs + 1):
        reset()
        begin = time.perf_counter()
        call()
        if run:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def with_trunkline(folder: Path, given: list[str], runs: int, **options: Any) -> tuple[float, int, int]:
    """Median seconds, and of one call the prompt tokens and those of them that came from the cache."""
    with Engine(str(folder), **options) as engine:
        seconds = timed(lambda: classify(engine, given), lambda: engine.call("flush_cache"), runs)
        engine.call("flush_cache")
        records = classify(engine, given)
    tokens = sum(record["prompt_tokens"] for record in records)
    return seconds, tokens, sum(record["cached_tokens"] for record in records)


def with_transformers(folder: Path, given: list[str], runs: int, dtype: torch.dtype) -> float:
    """Median seconds of one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def call() -> None:
        with torch.inference_mode():
            model(**tokenizer(given, return_tensors="pt", padding=True), use_cache=False)

    return timed(call, lambda: None, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        given = texts(AutoTokenizer.from_pretrained(folder), arguments.prompt_tokens, arguments.answers)
        shared, tokens, cached = with_trunkline(folder, given, arguments.runs, dtype=arguments.dtype)
        options = {"dtype": arguments.dtype, "disable_radix_cache": True}
        alone, _, _ = with_trunkline(folder, given, arguments.runs, **options)
        theirs = with_transformers(folder, given, arguments.runs, getattr(torch, arguments.dtype))
    print(f"{arguments.answers} answers to one prompt, {tokens} tokens in all, {cached} of them from the cache")
    print(f"{'radix cache':20}{shared:8.2f} s")
    print(f"{'no cache':20}{alone:8.2f} s  {alone / shared:5.1f} x")
    print(f"{'transformers, batch':20}{theirs:8.2f} s  {theirs / shared:5.1f} x")


if __name__ == "__main__":
    main()
