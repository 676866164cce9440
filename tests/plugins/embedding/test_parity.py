"""Vectors against sentence-transformers on folders that it wrote: cosine >= 0.99999 and the same lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize
from torch import nn

from trunkline.core import Engine
from trunkline.plugins.embedding.offline import encode
from trunkline.plugins.embedding.recipe import ACTIVATIONS, MODES

Saved = Callable[..., tuple[Path, Any]]
Engines = Callable[..., Engine]
Cosine = Callable[[np.ndarray, np.ndarray], float]
CLOSE = 0.99999
JOINED = ("cls", "mean", "lasttoken")


def normalize(width: int) -> Normalize:
    return Normalize()


def check(ours: np.ndarray, theirs: np.ndarray, cosine: Cosine) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert cosine(ours, theirs) >= CLOSE
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral-base"])
@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), JOINED, ("lasttoken", "weightedmean", "max")])
def test_causal_models(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine, name: str, modes: tuple[str, ...]
) -> None:
    """Single, batched, chunked, again with a warm cache and without one."""
    folder, library = saved(name, modes, normalize)
    theirs = library.encode(texts)
    whole, chunked = engine(folder, disable_radix_cache=True), engine(folder, chunked_prefill_size=9)
    check(encode(whole, texts), theirs, least_cosine)
    check(np.concatenate([encode(whole, [text]) for text in texts]), theirs, least_cosine)
    check(encode(chunked, texts), theirs, least_cosine)
    check(encode(chunked, texts), theirs, least_cosine)


def test_last_token_pooling_reuses_prefixes_and_other_poolings_do_not(
    saved: Saved, engine: Engines, texts: list[str]
) -> None:
    cached = {}
    for mode in ("lasttoken", "mean"):
        one = engine(saved("qwen3", (mode,), normalize)[0])
        encode(one, texts)
        ids = one.encode(texts[3])
        ticket = one.submit("embedding", ids, one.client.transport.loop.lanes[0].model.stages["embedding"].probe()[1])
        cached[mode] = (ticket.result(60).cached_tokens, len(ids))
    assert cached["lasttoken"][0] == cached["lasttoken"][1] - 1
    assert cached["mean"][0] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_with_every_activation(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine, activation: str
) -> None:
    def dense(width: int) -> Dense:
        return Dense(width, 24, activation_function=getattr(nn, activation)())

    dense.__name__ = activation
    folder, library = saved("qwen2", ("mean",), dense)
    check(encode(engine(folder), texts), library.encode(texts), least_cosine)


@pytest.mark.parametrize("outside", [40, 256])
def test_a_chain_of_every_module(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine, outside: int
) -> None:
    """Joined poolings, Dense with either residual and without bias, LayerNorm, Normalize in mid-chain."""

    def wide(width: int) -> Dense:
        return Dense(width, outside, use_residual=True)

    def norm(width: int) -> LayerNorm:
        return LayerNorm(width)

    def narrow(width: int) -> Dense:
        return Dense(width, 16, bias=False, activation_function=nn.Identity())

    def dropout(width: int) -> Dropout:
        return Dropout(0.5)

    wide.__name__ = f"wide{outside}"
    folder, library = saved("qwen2", ("mean", "lasttoken"), wide, dropout, norm, normalize, narrow)
    check(encode(engine(folder), texts), library.encode(texts), least_cosine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include", [True, False])
def test_prompts(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine, mode: str, include: bool
) -> None:
    folder, library = saved(
        "llama",
        (mode,),
        include_prompt=include,
        prompts={"query": "Represent the question: ", "short": "q "},
        default_prompt_name="query",
    )
    for options in ({}, {"chunked_prefill_size": 7}):
        one = engine(folder, **options)
        default = encode(one, texts)
        check(default, library.encode(texts), least_cosine)
        check(encode(one, texts, prompt_name="short"), library.encode(texts, prompt_name="short"), least_cosine)
        check(encode(one, texts, prompt="of its own: "), library.encode(texts, prompt="of its own: "), least_cosine)
        assert least_cosine(default, encode(one, texts, prompt="")) < CLOSE


def test_shorter_vectors_point_where_the_library_s_do(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine
) -> None:
    from trunkline.plugins.embedding import offline

    folder, library = saved("qwen2", ("mean",), normalize)
    settings = (folder / "config_sentence_transformers.json").read_text(encoding="utf-8")
    try:
        (folder / "config_sentence_transformers.json").write_text('{"matryoshka_dimensions": [16, 128]}')
        short = offline.encode(engine(folder), texts, dimensions=16)
    finally:
        (folder / "config_sentence_transformers.json").write_text(settings, encoding="utf-8")
    theirs = library.encode(texts, truncate_dim=16)
    assert least_cosine(short, theirs) >= CLOSE
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1.0, rtol=1e-5)


def test_texts_are_cut_where_the_library_cuts_them(
    saved: Saved, engine: Engines, texts: list[str], least_cosine: Cosine
) -> None:
    folder, library = saved("qwen2", ("lasttoken",), transformer={"processor_kwargs": {"model_max_length": 20}})
    assert library.max_seq_length == 20
    assert len(library.tokenizer(texts[3])["input_ids"]) > 20
    check(encode(engine(folder), texts, truncate="end"), library.encode(texts), least_cosine)


def test_lower_case(saved: Saved, engine: Engines, least_cosine: Cosine) -> None:
    texts = ["HELLO There", "ΣΟΦΟΣ ΣΑΣ", "</s>UPPER</s>"]
    folder, library = saved("qwen3", ("mean",), transformer={"do_lower_case": True})
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    ours = encode(engine(folder), texts)
    check(ours, library.encode(texts), least_cosine)
    check(ours[:1], encode(engine(folder), ["hello there"]), least_cosine)


def test_without_modules_the_last_token_is_taken(
    plain: Callable[[str], Path], engine: Engines, texts: list[str], least_cosine: Cosine, saved: Saved
) -> None:
    _, library = saved("llama", ("lasttoken",), normalize)
    check(encode(engine(plain("llama"), is_embedding=True), texts), library.encode(texts), least_cosine)
