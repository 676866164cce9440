"""The tiny checkpoints beside :data:`ZOO`: encoders, decoders without head, sequence classification, yes or no.

Most base models are sentence-transformers folders, each with another chain of modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .causal import BOS, CONTEXT, DENSE, EOS, MIXED, PAD, VOCABULARY


@dataclass(frozen=True, slots=True)
class Chain:
    """The modules after the transformer: pooling modes (concatenated), dense layers, normalisation."""

    pooling: tuple[str, ...]
    dense: tuple[tuple[int, str], ...] = ()  # width and activation of each
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    max_tokens: int | None = None  # max_seq_length; None = the context


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A transformers class, its config, its tokenizer and its chain of modules.

    ``declares`` is the architecture in config.json, if it isn't the class of the weights.
    """

    cls: str
    config: dict[str, Any]
    tokenizer: str = "decoder"  # a key of tokenizers.WRITERS
    chain: Chain | None = None
    declares: str = ""


_ENCODER = {key: DENSE[key] for key in DENSE if key != "num_key_value_heads"}
BERT = {**_ENCODER, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
ROBERTA = {
    **_ENCODER,
    "max_position_embeddings": CONTEXT + 2,
    "type_vocab_size": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 128,
    "hidden_dim": 192,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
MODERNBERT = {
    **_ENCODER,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "local_attention": 16,
    "layer_types": ["full_attention", "sliding_attention"],
}
DEBERTA = {
    **_ENCODER,
    "pad_token_id": 0,
    "relative_attention": True,
    "position_buckets": 16,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DECODER = {**DENSE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_NAMES = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}, "num_labels": 3}
_IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
_GEMMA2 = {**DECODER, **MIXED, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64}

ENCODERS: dict[str, Checkpoint] = {
    "bert": Checkpoint("BertModel", BERT, "wordpiece", Chain(("mean",), max_tokens=256)),
    "bert-masked": Checkpoint("BertForMaskedLM", BERT, "wordpiece"),
    "roberta": Checkpoint("RobertaModel", ROBERTA, "roberta", Chain(("mean", "max"), normalize=False)),
    "xlm-roberta": Checkpoint(
        "XLMRobertaModel",
        ROBERTA,
        "roberta",
        Chain(("cls",), prompts={"query": "the query: ", "passage": "the other: "}),
    ),
    "distilbert": Checkpoint(
        "DistilBertModel", DISTILBERT, "wordpiece-untyped", Chain(("mean",), ((64, "Tanh"),), False)
    ),
    "modernbert": Checkpoint("ModernBertModel", MODERNBERT, "modernbert", Chain(("cls",))),
    "mpnet": Checkpoint("MPNetModel", ROBERTA, "roberta", Chain(("mean",))),
    "deberta": Checkpoint(
        "DebertaV2Model", DEBERTA, "wordpiece-untyped", Chain(("mean_sqrt_len_tokens",), normalize=False)
    ),
    "qwen2-bidirectional": Checkpoint(
        "Qwen2Model", {**DECODER, "is_causal": False}, "decoder-eos", Chain(("lasttoken",)), "Qwen2ForCausalLM"
    ),
    "gemma3-bidirectional": Checkpoint(
        "Gemma3TextModel",
        {**DECODER, **MIXED, "sliding_window": 16, "query_pre_attn_scalar": 64, "use_bidirectional_attention": True},
        "decoder-both",
        Chain(("mean",), ((192, "Identity"), (128, "Identity"))),
    ),
}
"""Base models with bidirectional attention."""

DECODERS: dict[str, Checkpoint] = {
    "qwen2-base": Checkpoint("Qwen2Model", DECODER, "decoder-eos", Chain(("lasttoken",))),
    "qwen3-base": Checkpoint(
        "Qwen3Model",
        {**DECODER, "head_dim": 32, "tie_word_embeddings": True},
        "decoder-eos",
        Chain(("lasttoken",), prompts={"query": "Instruct: find it\nQuery:"}),
        "Qwen3ForCausalLM",
    ),
    "mistral-base": Checkpoint(
        "MistralModel", {**DECODER, "sliding_window": 8}, "decoder", Chain(("weightedmean",), normalize=False)
    ),
    "gemma3-base": Checkpoint(
        "Gemma3TextModel", {**DECODER, **MIXED, "query_pre_attn_scalar": 64}, "decoder-both", Chain(("mean",))
    ),
}
"""Base models with causal attention. The config.json of one names the class with head, as that of Qwen3-Embedding."""

SCORERS: dict[str, Checkpoint] = {
    "bert-score": Checkpoint("BertForSequenceClassification", {**BERT, "num_labels": 1, **_IDENTITY}, "wordpiece"),
    "bert-labels": Checkpoint("BertForSequenceClassification", {**BERT, **_NAMES}, "wordpiece"),
    "bert-multilabel": Checkpoint(
        "BertForSequenceClassification",
        {**BERT, **_NAMES, "problem_type": "multi_label_classification"},
        "wordpiece",
    ),
    "xlm-roberta-score": Checkpoint("XLMRobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}, "roberta"),
    "roberta-score": Checkpoint("RobertaForSequenceClassification", {**ROBERTA, "num_labels": 1}, "roberta"),
    "distilbert-labels": Checkpoint(
        "DistilBertForSequenceClassification", {**DISTILBERT, **_NAMES}, "wordpiece-untyped"
    ),
    "modernbert-score": Checkpoint(
        "ModernBertForSequenceClassification", {**MODERNBERT, "num_labels": 1}, "modernbert"
    ),
    "modernbert-mean-score": Checkpoint(
        "ModernBertForSequenceClassification",
        {**MODERNBERT, "num_labels": 1, "classifier_pooling": "mean"},
        "modernbert",
    ),
    "mpnet-score": Checkpoint("MPNetForSequenceClassification", {**ROBERTA, "num_labels": 1}, "roberta"),
    "deberta-labels": Checkpoint("DebertaV2ForSequenceClassification", {**DEBERTA, **_NAMES}, "wordpiece-untyped"),
    "llama-score": Checkpoint("LlamaForSequenceClassification", {**DECODER, "num_labels": 1}),
    "qwen2-labels": Checkpoint("Qwen2ForSequenceClassification", {**DECODER, **_NAMES}),
    "qwen3-score": Checkpoint("Qwen3ForSequenceClassification", {**DECODER, "head_dim": 32, "num_labels": 1}),
    "gemma2-score": Checkpoint("Gemma2ForSequenceClassification", {**_GEMMA2, "num_labels": 1}, "decoder-both"),
    "mixtral-score": Checkpoint(
        "MixtralForSequenceClassification",
        {**DECODER, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "num_labels": 1},
    ),
}
"""Sequence classification models with one score or three labels."""

ANSWERERS: dict[str, Checkpoint] = {
    "qwen3-yes-no": Checkpoint(
        "Qwen3ForCausalLM", {**DECODER, "head_dim": 32, "tie_word_embeddings": True}, "decoder-yes-no"
    ),
}
"""Language models whose tokenizer has "yes" and "no" as tokens, and special tokens of chat templates."""
