"""Infinity's torch engine as a worker of embedding.py, in an environment of its own.

It pins other versions of transformers and numpy than trunkline uses, so embedding.py runs this file
with the interpreter that ``--infinity`` names (``pip install 'infinity-emb[torch]'``).
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time

import numpy as np
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


async def main(folder: str, dtype: str) -> None:
    """Answer lists of texts on stdin with runs on stdout, one JSON line each, until end of file."""
    arguments = EngineArgs(
        model_name_or_path=folder, engine="torch", device="cpu", dtype=dtype, batch_size=32, bettertransformer=False,
        compile=False, model_warmup=False,
    )  # fmt: skip
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        print("ready", flush=True)
        for line in sys.stdin:
            texts = json.loads(line)
            start = time.perf_counter()
            vectors, _ = await engine.embed(texts)
            wall = time.perf_counter() - start
            coded = base64.b64encode(np.asarray(vectors, np.float32).tobytes()).decode()
            print(json.dumps({"wall": wall, "vectors": coded}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
