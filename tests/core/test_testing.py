"""The tiny checkpoints must be the same everywhere and must show a broken mask, position or bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trunkline.core.testing import ANSWERERS, DECODERS, ENCODERS, SCORERS, ZOO, build_checkpoint

OTHERS = {**ENCODERS, **DECODERS, **SCORERS, **ANSWERERS}


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "distilbert", "qwen2-bidirectional", "qwen3-yes-no"])
def test_the_same_bytes_on_every_run(name: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    torch.rand(3)  # whatever was drawn before
    again = build_checkpoint(name, tmp_path / name)
    assert contents(again) == contents(zoo(name))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_was_said_matters(name: str, zoo: Callable[[str], Path]) -> None:
    """Scores spread; the first token and the order of the others move the last position's scores."""
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(zoo(name), attn_implementation="eager").eval()
    ids = torch.randint(3, 512, (20,), generator=torch.Generator().manual_seed(1))
    other_start, other_order = ids.clone(), ids.clone()
    other_start[0] += 1
    other_order[12:18] = other_order[12:18].flip(0)
    with torch.inference_mode():
        scores, started, ordered = (whole(row[None]).logits[0, -1] for row in (ids, other_start, other_order))
    assert scores.std() > 1
    assert (scores - ordered).abs().max() > 0.1
    if name != "mistral-sliding":  # two layers with windows of 8 don't reach back to the first of 20
        assert (scores - started).abs().max() > 0.01


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_where_it_was_said_matters(name: str, zoo: Callable[[str], Path]) -> None:
    """Hidden rows at both ends move when the tokens between change their order; decoders' first one doesn't."""
    import transformers

    whole = transformers.AutoModel.from_pretrained(zoo(name), attn_implementation="eager").eval()
    ids = torch.randint(5, 512, (12,), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[3:9] = other[3:9].flip(0)
    with torch.inference_mode():
        before, after = (whole(input_ids=row[None]).last_hidden_state[0] for row in (ids, other))
    moved = (before - after).abs().amax(-1) / before.std()
    assert moved[-1] > 0.05
    causal = name not in ENCODERS and whole.config.model_type in {"llama", "qwen2", "qwen3", "mistral", "mixtral"}
    if causal:
        assert moved[0] == 0
    elif name in ENCODERS:
        assert moved[0] > 0.05


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_tokenizers_put_their_frames_around_texts(name: str, zoo: Callable[[str], Path]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo(name))
    kind, dash, _ = OTHERS[name].tokenizer.partition("-untyped")
    single, pair = (tokenizer.convert_ids_to_tokens(tokenizer.encode(*texts)) for texts in (("in",), ("in", "on")))
    frames = {
        "wordpiece": (["[CLS]", "in", "[SEP]"], ["[CLS]", "in", "[SEP]", "on", "[SEP]"]),
        "modernbert": (["[CLS]", "in", "[SEP]"], ["[CLS]", "in", "[SEP]", "o", "n", "[SEP]"]),
        "roberta": (["<s>", "in", "</s>"], ["<s>", "in", "</s>", "</s>", "o", "n", "</s>"]),
        "decoder": (["in"], ["in", "o", "n"]),
        "decoder-eos": (["in", "</s>"], ["in", "o", "n"]),
        "decoder-both": (["<s>", "in", "</s>"], ["in", "o", "n"]),
        "decoder-yes-no": (["in"], ["in", "o", "n"]),
    }
    join = "".join
    assert (join(single), join(pair)) == (join(frames[kind][0]), join(frames[kind][1]))
    types = tokenizer("in", "on").get("token_type_ids")
    assert types == ([0, 0, 0, 1, 1] if kind == "wordpiece" and not dash else None)


def test_yes_and_no_are_tokens(zoo: Callable[[str], Path]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo("qwen3-yes-no"))
    encoded = [tokenizer.encode(text) for text in ("yes", "no", "<|im_start|>", "<think>")]
    assert [len(ids) for ids in encoded] == [1, 1, 1, 1]
    assert len({ids[0] for ids in encoded}) == 4


@pytest.mark.parametrize("name", sorted(name for name, made in OTHERS.items() if made.chain is not None))
def test_sentence_transformers_takes_the_folders(name: str, zoo: Callable[[str], Path]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    made, chain = OTHERS[name], OTHERS[name].chain
    assert chain is not None
    model = sentence_transformers.SentenceTransformer(str(zoo(name)), device="cpu")
    vectors = model.encode(["the other line", "a third one there"])
    width = chain.dense[-1][0] if chain.dense else 128 * len(chain.pooling)
    assert vectors.shape == (2, width)
    assert model.prompts.get("query", "") == chain.prompts.get("query", "")
    assert model.max_seq_length == (chain.max_tokens or 512)
    assert made.cls == type(model[0].auto_model).__name__ or made.declares
    assert (abs((vectors**2).sum(-1) - 1) < 1e-5).all() == chain.normalize
