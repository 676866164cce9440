"""OpenVINO GenAI as a worker of quantisation.py, in an environment of its own, in this process and without HTTP.

quantisation.py runs this file with the interpreter that ``--openvino`` names
(``pip install openvino-genai 'optimum-intel[openvino]'``).
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GIB = 2
PASS_TOKENS = 1024


def pipeline(folder: str, threads: int) -> Any:
    """Continuous batching with chunked prompts and a prefix cache, as trunkline has them."""
    schedule = openvino_genai.SchedulerConfig()
    schedule.cache_size, schedule.max_num_batched_tokens = CACHE_GIB, PASS_TOKENS
    schedule.dynamic_split_fuse = schedule.enable_prefix_caching = True
    return openvino_genai.ContinuousBatchingPipeline(folder, schedule, "CPU", {"INFERENCE_NUM_THREADS": threads})


def perplexity(folder: str, rows: list[list[int]]) -> float:
    """Of rows of token ids; each is read on its own."""
    import torch
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(logits)
    return math.exp(total / count)


def main(folder: str, threads: int) -> None:
    """Answer scenarios on stdin with seconds on stdout, or rows of ids with their perplexity: one JSON line each."""
    made = None
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "rows" in asked:
            print(json.dumps(perplexity(folder, asked["rows"])), flush=True)
            continue
        made = made or pipeline(folder, threads)
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = asked["new_tokens"], True, False
        prompts = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in asked["prompts"]]
        start = time.perf_counter()
        replies = made.generate(prompts, [options] * len(prompts))
        wall = time.perf_counter() - start
        assert all(len(reply.m_generation_ids[0]) == asked["new_tokens"] for reply in replies)
        print(json.dumps(wall), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
