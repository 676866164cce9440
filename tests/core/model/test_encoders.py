"""Hidden rows and scores of models that don't generate, against transformers: packed, padded, with token types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.errors import ModelError
from trunkline.core.model import attention, loader, packed, padded, scores
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.packed import PackedModel
from trunkline.core.model.sizes.plan import plan_model
from trunkline.core.model.sources.info import read_info
from trunkline.core.settings import ModelSettings
from trunkline.core.testing import DECODERS, ENCODERS, PAD, SCORERS
from trunkline.core.types import Head, ModelSource
from trunkline.kernels.backend import Backend, choose

LENGTHS = (5, 1, 33, 40, 12)
TOLERANCE = 1e-4  # absolute, float32
TRITON = ("bert", "modernbert")  # in Triton's interpreter; the others in a suite
PADDED = {"mpnet", "deberta", "mpnet-score", "deberta-labels"}

Start = Callable[..., LoadedModel]


def positions(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """int64 ``[T]``: each row's positions, one row after another."""
    return torch.cat([torch.arange(start, end) for start, end in spans])


@pytest.fixture
def start(zoo: Callable[[str], Path]) -> Start:
    def load(name: str, backend: str | Backend = "torch_native", heads: tuple[Head, ...] = ()) -> LoadedModel:
        source = ModelSource(name, str(zoo(name)))
        settings = ModelSettings(model_path=source.path, dtype="float32")
        info = read_info(source, settings)
        assert plan_model(source, info, settings, torch.device("cpu")).weight_bytes > 0
        own = (*heads, scores.head(info)) if info.score_rows else heads
        kernels = choose(backend, "cpu") if isinstance(backend, str) else backend
        return loader.load(source, info, settings, own, kernels)

    return load


def reference(folder: Path, auto: str = "AutoModel") -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager").eval()


def sequences() -> list[torch.Tensor]:
    """Token ids that are no padding's: transformers' RoBERTa leaves out that one when it counts positions."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (length,), generator=generator) for length in LENGTHS]


def forward(model: LoadedModel, texts: list[torch.Tensor], types: list[torch.Tensor] | None = None) -> Any:
    lengths = [len(ids) for ids in texts]
    places = positions([(0, length) for length in lengths])
    joined = None if types is None else torch.cat(types)
    return torch.split(model.forward(torch.cat(texts), places, packed_layout(lengths), None, joined), lengths)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for backend in ("torch_native", "cpu") for name in sorted({**ENCODERS, **DECODERS})]
    + [
        pytest.param(name, "triton", marks=[] if name in TRITON else pytest.mark.interpreter)
        for name in sorted({**ENCODERS, **DECODERS})
        if find_spec("triton")
    ],
)
def test_hidden_rows_together_are_those_of_each_alone(
    name: str, backend: str, start: Start, zoo: Callable[[str], Path]
) -> None:
    model = start(name, backend)
    assert model.padded is (name in PADDED)
    assert model.info.causal is (name in DECODERS)
    assert bool(model.kv_shapes) is model.info.causal
    whole = reference(zoo(name))
    with torch.inference_mode():
        for ids, mine in zip(sequences(), forward(model, sequences()), strict=True):
            assert (mine - whole(input_ids=ids[None]).last_hidden_state[0]).abs().max() < TOLERANCE
            assert (forward(model, [ids])[0] - mine).abs().max() < TOLERANCE


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
def test_the_second_text_of_a_pair_has_another_type(backend: str, start: Start, zoo: Callable[[str], Path]) -> None:
    model, whole = start("bert", backend), reference(zoo("bert"))
    types = [(torch.arange(length) >= length // 2).long() for length in LENGTHS]
    plain = forward(model, sequences())
    with torch.inference_mode():
        for ids, kinds, mine, single in zip(sequences(), types, forward(model, sequences(), types), plain, strict=True):
            theirs = whole(input_ids=ids[None], token_type_ids=kinds[None]).last_hidden_state[0]
            assert (mine - theirs).abs().max() < TOLERANCE
            assert (mine - single).abs().max() > 0.01


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", sorted(SCORERS))
def test_scores_by_hand_are_the_classes_own(name: str, backend: str, start: Start, zoo: Callable[[str], Path]) -> None:
    model = start(name, backend)
    pooled = []
    for rows in forward(model, sequences()):
        pooled.append({"first": rows[0], "last": rows[-1], "mean": rows.mean(0)}[model.info.score_rows])
    whole = reference(zoo(name), "AutoModelForSequenceClassification")
    with torch.inference_mode():
        mine = model.heads["score"](torch.stack(pooled))
        theirs = torch.cat([whole(input_ids=ids[None]).logits for ids in sequences()])
    assert mine.shape == theirs.shape == (len(LENGTHS), whole.config.num_labels)
    assert (mine - theirs).abs().max() < TOLERANCE
    assert theirs.std(0).min() > 0.02  # scores that don't depend on the text would prove nothing


@pytest.mark.parametrize(
    ("name", "wrong"), [("bert-score", "last"), ("llama-score", "first"), ("modernbert-mean-score", "first")]
)
def test_a_head_on_the_wrong_rows_is_refused(name: str, wrong: str, start: Start) -> None:
    head = Head("wrong", scores.score_head, scores.reference, rows=wrong)
    model = start(name, heads=(head,))
    assert set(model.heads) == {"score"}
    assert "differs from" in model.refused["wrong"]


def test_rows_must_be_known(start: Start) -> None:
    model = start("bert-score", heads=(Head("odd", scores.score_head, scores.reference, rows="best"),))
    assert "'best', not 'first', 'last' or 'mean'" in model.refused["odd"]


def test_the_last_token_is_scored_even_if_it_is_the_paddings(start: Start, zoo: Callable[[str], Path]) -> None:
    """transformers scores the token before it: MODELS where padding is the end of a turn would lose the end."""
    model, whole = start("llama-score"), reference(zoo("llama-score"), "AutoModelForSequenceClassification")
    ids = torch.tensor([9, 8, 7, PAD])
    (rows,) = forward(model, [ids])
    with torch.inference_mode():
        theirs = whole(input_ids=ids[None]).logits
        ours = whole.score(whole.model(input_ids=ids[None]).last_hidden_state[:, -1])
    assert (model.heads["score"](rows[-1:]) - ours).abs().max() < TOLERANCE
    assert (theirs - ours).abs().max() > 0.01


# -- what is proven at load ------------------------------------------------------------------


def test_positions_that_begin_elsewhere_are_caught(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "position_offset", lambda _: 0)
    for name in ("roberta", "mpnet"):
        with pytest.raises(ModelError, match="padded, its warm-up differs from transformers' own forward"):
            start(name)
    assert start("bert").position_offset == 0


def test_token_types_that_are_lost_are_caught(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = PackedModel.keywords
    monkeypatch.setattr(PackedModel, "keywords", lambda self, places, _: keywords(self, places, None))
    with pytest.raises(ModelError, match="differs from transformers' own forward"):
        start("bert")


def test_a_mask_that_is_ignored_is_caught(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(backbone: Any, tokens: Any, layout: Any, boundaries: Any) -> torch.Tensor:
        def all_seen(**given: Any) -> Any:
            return backbone(**{**given, "attention_mask": torch.ones_like(given["attention_mask"])})

        return padded.forward_padded(all_seen, tokens, layout)

    monkeypatch.setattr(packed, "forward_padded", unmasked)
    with pytest.raises(ModelError, match="MPNetModel can't be served: padded"):
        start("mpnet")


def test_an_encoder_whose_rows_see_each_other_falls_back_to_padded_batches(
    start: Start, zoo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaky(*args: Any, trunk: Any = None, **given: Any) -> Any:
        one_row = packed_layout([int(trunk.layout.q_start[-1])])
        trunk.calls += 1
        return right(*args, trunk=attention.ForwardContext(one_row, None, trunk.backend), **given)

    import transformers

    right = attention.attend
    monkeypatch.setattr(attention, "attend", leaky)
    try:
        model = start("bert", "cpu")
    finally:
        transformers.AttentionInterface.register(attention.NAME, right)
    assert model.padded
    assert model.fused.startswith("padded batches")
    whole = reference(zoo("bert"))
    with torch.inference_mode():
        for ids, mine in zip(sequences(), forward(model, sequences()), strict=True):
            assert (mine - whole(input_ids=ids[None]).last_hidden_state[0]).abs().max() < TOLERANCE


# -- padded batches --------------------------------------------------------------------------


def test_padded_batches_hold_rows_of_about_one_length() -> None:
    lengths = [3, 100, 85, 79, 3, 1, 64]
    found = list(padded.batches(lengths))
    assert found == [[1, 2], [3, 6], [0, 4], [5]]
    assert list(padded.batches([])) == []


def test_padded_batches_compute_what_they_say(start: Start) -> None:
    model, shapes = start("mpnet"), []
    inner = model.backbone.forward

    def spy(**given: Any) -> Any:
        shapes.append((tuple(given["input_ids"].shape), given["attention_mask"].sum(1).tolist()))
        return inner(**given)

    model.backbone.forward = spy
    forward(model, sequences())
    assert shapes == [((2, 40), [40, 33]), ((1, 12), [12]), ((1, 5), [5]), ((1, 1), [1])]
