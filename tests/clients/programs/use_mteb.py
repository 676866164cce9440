"""A task of mteb with a few pairs of sentences, by a server and by sentence-transformers; prints both scores.

The arguments are the base URL of a server and the folder of the same model.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mteb
import openai
import tiktoken
from datasets import Dataset
from mteb.abstasks import AbsTaskSTS
from mteb.models.model_implementations.openai_models import OpenAIModel
from sentence_transformers import SentenceTransformer

PAIRS = [
    ("A man is eating.", "Somebody has a meal.", 4.5),
    ("A man is eating.", "The sea is calm.", 0.2),
    ("The sea is calm.", "There are no waves on the water.", 4.0),
    ("A child plays the piano.", "A girl makes music.", 3.2),
    ("A child plays the piano.", "The train is late.", 0.1),
    ("The train is late.", "We wait at the station.", 2.5),
]
BYTES = tiktoken.Encoding(
    "bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
)


class Sentences(AbsTaskSTS):
    metadata = mteb.TaskMetadata(
        name="Sentences",
        description="Six pairs of English sentences",
        type="STS",
        category="t2t",
        modalities=["text"],
        dataset={"path": "trunkline/sentences", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )
    min_score, max_score = 0, 5

    def load_data(self, **_: Any) -> None:
        first, second, scores = zip(*PAIRS, strict=True)
        self.dataset = {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})}
        self.data_loaded = True


def scores(model: Any) -> dict[str, float]:
    result = mteb.evaluate(model, Sentences(), cache=None, co2_tracker=False)
    [found] = result.task_results[0].scores["test"]
    return {name: value for name, value in found.items() if name.startswith("cosine")}


def main(url: str, folder: str) -> None:
    local = SentenceTransformer(folder, device="cpu")
    # mteb shortens texts with a tokenizer of OpenAI's, which tiktoken would download
    tiktoken.registry.ENCODINGS = {"bytes": BYTES}
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    width = local.get_sentence_embedding_dimension()
    served = OpenAIModel("default", max_tokens=256, tokenizer_name="bytes", embed_dim=width, client=client)
    print(json.dumps([scores(served), scores(local)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
