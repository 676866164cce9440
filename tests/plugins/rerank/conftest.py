"""Tiny rerankers of every class, with tokenizers built by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "a", "of", "is", "in", "what", "capital", "france", "china", "paris", "beijing", "gravity", "force"]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: [CLS] query [SEP] document [SEP], token type 1 from the document on."""
    letters = "abcdefghijklmnopqrstuvwxyz?.,:"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def roberta() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: <s> query </s></s> document </s>, no token types."""
    tokenizer, vocabulary = _byte_level(("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
    )


def qwen(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Qwen's kind: no special tokens around a text; "yes" and "no" are tokens."""
    tokenizer, _ = _byte_level(("<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    wrapped.chat_template = template
    return wrapped


def _byte_level(specials: tuple[str, ...]) -> tuple[Tokenizer, dict[str, int]]:
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("i", "s"), ("Ġ", "is")]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer, vocabulary


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "roberta": roberta,
    "qwen": qwen,
}


def build(
    folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, extra: dict[str, Any], **options: Any
) -> Path:
    """Write a checkpoint whose weights all matter. ``extra`` is added to its config.json as it stands."""
    cls = getattr(transformers, architecture)
    given = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **options}
    if architecture.startswith("DistilBert"):
        given |= {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    config = cls.config_class(**given)
    config.architectures = [architecture]
    with torch.random.fork_rng(devices=[]):
        model = cls(config).float()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2:
                tensor.copy_(0.3 * noise + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))
            else:
                tensor.copy_(noise / (4.0 if "token_type" in name else tensor.shape[1] ** 0.5))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return folder


MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "wordpiece", {}, {"num_labels": 1}),
    "bert-sigmoid": (
        "BertForSequenceClassification",
        "wordpiece",
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
        {"num_labels": 1},
    ),
    "distilbert": ("DistilBertForSequenceClassification", "wordpiece", {}, {"num_labels": 1}),
    "roberta": (
        "RobertaForSequenceClassification",
        "roberta",
        {},
        {"num_labels": 1, "type_vocab_size": 1, "max_position_embeddings": 260},
    ),
    "xlmr": (
        "XLMRobertaForSequenceClassification",
        "roberta",
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"num_labels": 1, "type_vocab_size": 1, "max_position_embeddings": 260},
    ),
    "modernbert-cls": ("ModernBertForSequenceClassification", "roberta", {}, {"num_labels": 1, "local_attention": 16}),
    "modernbert-mean": (
        "ModernBertForSequenceClassification",
        "roberta",
        {},
        {"num_labels": 1, "local_attention": 16, "classifier_pooling": "mean"},
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "wordpiece",
        {},
        {"num_labels": 1, "type_vocab_size": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": (
        "MPNetForSequenceClassification",
        "roberta",
        {},
        {"num_labels": 1, "max_position_embeddings": 260},
    ),
    "qwen3-reranker": ("Qwen3ForCausalLM", "qwen", {}, {}),
    "gemma2-reranker": ("Gemma2ForCausalLM", "qwen", {}, {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "qwen3-reranker-seqcls": ("Qwen3ForSequenceClassification", "qwen", {}, {"num_labels": 1}),
    "llama": ("LlamaForCausalLM", "qwen", {}, {}),
    "llama-reward": ("LlamaForSequenceClassification", "qwen", {}, {"num_labels": 1}),
}
"""Name -> (class, tokenizer, what config.json has beyond it, config)."""


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name in ``MODELS`` to the folder of its checkpoint, built at the first call."""
    root = tmp_path_factory.mktemp("rerankers")

    def checkpoint(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            architecture, tokenizer, extra, options = MODELS[name]
            build(folder, architecture, TOKENIZERS[tokenizer](), extra, **options)
        return folder

    return checkpoint


@pytest.fixture
def url(shared_server: Callable[..., Any], reranker: Callable[[str], Path]) -> str:
    """The address of a server with a cross-encoder, a causal reranker and a model that is no reranker."""
    models = [str(reranker(name)) for name in ("bert", "qwen3-reranker", "llama")]
    return str(shared_server("--dtype", "float32", "--context-length", "1024", *models).url)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
