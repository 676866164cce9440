"""Tokenizers with :data:`VOCABULARY` entries, without training, whose results differ from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .causal import CONTEXT, VOCABULARY

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DECODER = ("<pad>", "<s>", "</s>", "<unk>")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARKS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_LETTERS = "etaoinshrdlu"
_WORDS = (
    "the of and to in is was it for on are as with his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two "
    "more write go see number no way could people my than first water been call who oil its now find "
    "long down day did get come made may part capital city france paris china gravity force earth"
)


def write_tokenizer(folder: Path, kind: str = "decoder") -> None:
    """Write tokenizer.json and tokenizer_config.json. ``kind`` is a key of :data:`WRITERS`."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[kind](folder)


def _decoder(folder: Path, single: str = "", marks: tuple[str, ...] = (), merges: Sequence[str] = ()) -> None:
    """Byte-level BPE with a chat template; ``single``: template of the special tokens around a text, "" for none."""
    specials = (*DECODER, *marks)
    tokenizer = byte_level(specials, merges)
    if single:
        _surround(tokenizer, single, "", specials)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _save(tokenizer, folder, **names, chat_template=CHAT_TEMPLATE)


def _roberta(folder: Path) -> None:
    """Byte-level BPE with RoBERTa's special tokens and their ids."""
    tokenizer = byte_level(ROBERTA)
    _surround(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>", ROBERTA)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    more = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    _save(tokenizer, folder, **names, **more, model_input_names=["input_ids", "attention_mask"])


def _modernbert(folder: Path) -> None:
    """Byte-level BPE with BERT's special tokens, without token types."""
    tokenizer = byte_level(BERT)
    _surround(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", BERT)
    _save(tokenizer, folder, **_BERT_NAMES, model_input_names=["input_ids", "attention_mask"])


def _wordpiece(folder: Path, types: bool = True) -> None:
    """Lower-case WordPiece: whole words, then letters. With ``types`` the second text of a pair has token type 1."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    signs = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    entries = [*BERT, *letters, *(f"##{letter}" for letter in letters), *signs, *_WORDS.split()]
    vocabulary: dict[str, int] = {}
    for entry in (*entries, *(f"[unused{number}]" for number in range(VOCABULARY))):
        if len(vocabulary) < VOCABULARY:
            vocabulary.setdefault(entry, len(vocabulary))
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(BERT))
    _surround(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", BERT)
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    _save(tokenizer, folder, **_BERT_NAMES, model_input_names=inputs)


def byte_level(specials: Sequence[str], words: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE. Its merges aren't trained: they are pairs of common English letters, also after a space.

    Each of ``words`` is a single token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*specials, *alphabet))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if len(vocabulary) < VOCABULARY and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))

    for word in words:
        for end in range(1, len(word)):
            merge(word[:end], word[end])
    for left in ("Ġ", *_LETTERS):
        for right in _LETTERS:
            merge(left, right)
    while len(vocabulary) < VOCABULARY:  # a model's vocabulary may be larger than its tokenizer's
        vocabulary[f"<reserved {len(vocabulary)}>"] = len(vocabulary)
    unknown = next(token for token in specials if "unk" in token.lower())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def _surround(tokenizer: Tokenizer, single: str, pair: str, specials: Sequence[str]) -> None:
    """Add special tokens around texts, by templates of the library tokenizers; ``pair`` "" joins two texts directly."""
    from tokenizers import processors

    ids = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair or "$A $B", special_tokens=ids)


def _save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(common, indent=2), encoding="utf-8")


_BERT_NAMES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}

WRITERS: dict[str, Callable[[Path], None]] = {
    "decoder": _decoder,
    "decoder-eos": lambda folder: _decoder(folder, "$A </s>"),
    "decoder-both": lambda folder: _decoder(folder, "<s> $A </s>"),
    "decoder-yes-no": lambda folder: _decoder(folder, marks=MARKS, merges=("yes", "no")),
    "roberta": _roberta,
    "modernbert": _modernbert,
    "wordpiece": _wordpiece,
    "wordpiece-untyped": lambda folder: _wordpiece(folder, types=False),
}
"""Kind -> function that writes a tokenizer of this kind into a folder."""
