"""How much a score depends on what was cached before.

Each document is scored against the same query cold (nothing cached), again with its whole prompt cached, and again
in one batch with others. Where all layers run on our own kernels the three are equal bit for bit. Elsewhere products
sum in an order that depends on the number of rows; this prints how far scores (log odds of yes against no) lie apart.

    python benchmarks/cache_effect.py [MODEL …] [--dtype bfloat16] [--attention-backend torch_native]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trunkline.core import Engine
from trunkline.plugins.rerank.offline import rerank

QUERY = "how does the server share computed prefixes between requests?"
ROOT = Path(__file__).resolve().parent.parent


def documents(most: int) -> list[str]:
    """Sentences of the project's documentation."""
    lines = [
        line.strip(" *|") for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text().split("\n")
    ]
    return list(dict.fromkeys(line for line in lines if 20 < len(line) < 400))[:most]


def logits(engine: Engine, texts: Sequence[str]) -> NDArray[np.float64]:
    """The raw score of each text, in their order, all in one batch."""
    records = sorted(rerank(engine, QUERY, texts), key=lambda record: int(record["index"]))
    return np.array([record["logit"] for record in records])


def differences(engine: Engine, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far the scores with a cached prompt, and those of batches, are from cold ones."""
    cold, warm = [], []
    for text in texts:
        engine.call("flush_cache")
        cold.append(logits(engine, [text])[0])
        warm.append(logits(engine, [text])[0])
    engine.call("flush_cache")
    batches = [logits(engine, texts[start : start + 16]) for start in range(0, len(texts), 16)]
    return np.abs(np.array(warm) - cold), np.abs(np.concatenate(batches) - cold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo:smollm2-135m-instruct"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--documents", type=int, default=400)
    options = parser.parse_args()
    texts = documents(options.documents)
    print("| model | dtype | backend | compared with cold | equal | median | 99% | 99.9% | largest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in options.models:
        with Engine(
            model, task=("rerank",), dtype=options.dtype, attention_backend=options.attention_backend
        ) as engine:
            served = engine.models[0]
            for name, apart in zip(("prompt cached", "in a batch"), differences(engine, texts), strict=True):
                points = " | ".join(f"{np.quantile(apart, q):.2e}" for q in (0.5, 0.99, 0.999, 1))
                print(
                    f"| {model} | {served.dtype} | {served.attention_backend} | {name} | {np.mean(apart == 0):.1%} "
                    f"| {points} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
