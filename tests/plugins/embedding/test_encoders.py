"""Encoders and decoders of the zoo, and the real all-MiniLM-L6-v2, against sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from trunkline.core import Engine
from trunkline.core.testing import DECODERS, ENCODERS
from trunkline.plugins.embedding.offline import encode

Engines = Callable[..., Engine]
Cosine = Callable[[np.ndarray, np.ndarray], float]
CLOSE = 0.99999
CHAINED = [name for name, made in {**ENCODERS, **DECODERS}.items() if made.chain is not None]


@pytest.mark.parametrize("name", CHAINED)
def test_folders_of_every_family(
    zoo: Callable[[str], Path], engine: Engines, texts: list[str], least_cosine: Cosine, name: str
) -> None:
    """Batched, alone and in small passes."""
    folder = zoo(name)
    library = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    one, small = engine(folder), engine(folder, chunked_prefill_size=11, max_running_requests=2)
    assert "embedding" in one.models[0].tasks
    for prompt_name in (None, *library.prompts):
        if prompt_name is not None and not library.prompts[prompt_name]:
            continue
        theirs = library.encode(texts, prompt_name=prompt_name)
        for ours in (
            encode(one, texts, prompt_name=prompt_name),
            np.concatenate([encode(one, [text], prompt_name=prompt_name) for text in texts]),
            encode(small, texts, prompt_name=prompt_name),
        ):
            assert least_cosine(ours, theirs) >= CLOSE
            np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-4)


def test_an_encoder_without_modules_gives_its_first_row(
    zoo: Callable[[str], Path], engine: Engines, texts: list[str], least_cosine: Cosine
) -> None:
    import transformers

    folder = zoo("bert-masked")
    one = engine(folder)
    ours = encode(one, texts)
    bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [bert(torch.tensor([one.encode(text)])).last_hidden_state[0, 0] for text in texts]
    assert least_cosine(ours, torch.stack(rows).numpy()) >= CLOSE
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_minilm(minilm: Path, engine: Engines, texts: list[str], least_cosine: Cosine, dtype: str) -> None:
    """The real model; long texts are cut at 256 tokens, where the library cuts them."""
    library = SentenceTransformer(str(minilm), device="cpu")
    many = [*texts, "How are you today? " * 90, "Ich bin ein Berliner.", "漢字とかな"]
    theirs = library.encode(many)
    one = engine(minilm, dtype=dtype)
    close = CLOSE if dtype == "float32" else 0.999
    assert least_cosine(encode(one, many, truncate="end"), theirs) >= close
    assert least_cosine(np.concatenate([encode(one, [text], truncate="end") for text in many]), theirs) >= close
    assert one.models[0].info.causal is False
    near = encode(one, ["A man is eating food.", "Somebody eats a meal.", "The stock market fell."])
    assert near[0] @ near[1] > 0.5 > near[0] @ near[2]


@pytest.mark.field
@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "qwen2-base", "gemma3-bidirectional"])
def test_vectors_of_a_bfloat16_model_are_made_in_float32(
    zoo: Callable[[str], Path], engine: Engines, texts: list[str], name: str
) -> None:
    vectors = encode(engine(zoo(name), dtype="bfloat16"), texts)
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6  # in bfloat16: 4e-3
