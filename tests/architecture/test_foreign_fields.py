"""The request fields of other servers and of clients' own types are all known: no route drops one unawares.

The lists of servers are frozen: where one comes from, and of which version, is said beside it.
"""

from __future__ import annotations

from typing import Any

import cohere
import pytest
from msgspec import Struct
from openai.types import completion_create_params as text_completion_create_params
from openai.types import embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
    completion_create_params,
)
from openai.types.responses import response_create_params

from trunkline.core.server.api.chat_messages import ChatMessage
from trunkline.core.server.api.fields import fields_of
from trunkline.plugins.embedding.body_schemas import (
    CohereContent,
    CohereEmbedBody,
    DecodeBody,
    EmbedBody,
    EmbeddingsBody,
    EncodeBody,
)
from trunkline.plugins.generation.native.body_schemas import GenerateBody
from trunkline.plugins.generation.openai.body_schemas import StreamOptions
from trunkline.plugins.generation.openai.chat_schemas import ChatBody
from trunkline.plugins.generation.openai.completion_schemas import CompletionBody
from trunkline.plugins.generation.responses.schemas import ResponsesBody
from trunkline.plugins.rerank.body_schemas import RerankBody, ScoreBody
from trunkline.plugins.reward.body_schemas import ClassifyBody, OpenAIClassifyBody

pytestmark = pytest.mark.field


def unknown(schema: type[Struct], theirs: set[str]) -> set[str]:
    """Fields that a body would ignore without saying so."""
    return theirs - {path for path, _ in fields_of(schema)}


# -- clients' own types ----------------------------------------------------------------------

MESSAGES = (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)


def fields(*types: type[Any]) -> set[str]:
    return {name for kind in types for base in kind.__mro__ for name in getattr(base, "__annotations__", ())}


@pytest.mark.parametrize(
    ("schema", "theirs"),
    [
        (ChatBody, fields(completion_create_params.CompletionCreateParamsBase) | {"stream"}),
        (CompletionBody, fields(text_completion_create_params.CompletionCreateParamsBase) | {"stream"}),
        (ResponsesBody, fields(response_create_params.ResponseCreateParamsBase) | {"stream"}),
        (StreamOptions, fields(ChatCompletionStreamOptionsParam)),
        (ChatMessage, {name for kind in MESSAGES for name in kind.__annotations__}),
        (EmbeddingsBody, set(embedding_create_params.EmbeddingCreateParams.__annotations__)),
    ],
)
def test_the_openai_sdk_s_fields_are_known(schema: type[Struct], theirs: set[str]) -> None:
    assert len(theirs) > 1
    assert unknown(schema, theirs) == set()


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_the_cohere_sdk_s_fields_are_known(client: type[Any]) -> None:
    theirs = set(client.rerank.__annotations__) - {"return", "request_options"}
    assert "documents" in theirs
    assert unknown(RerankBody, theirs) == set()
    # v1's client has fields of its own: whether and how it splits texts into requests
    of_embed = set(client.embed.__annotations__) - {"return", "request_options", "batching", "max_workers"}
    assert "embedding_types" in of_embed
    assert unknown(CohereEmbedBody, of_embed) == set()


def test_the_contents_of_the_cohere_sdk_are_known() -> None:
    kinds = (cohere.TextEmbedContent, cohere.ImageUrlEmbedContent)
    assert unknown(CohereContent, {name for kind in kinds for name in kind.model_fields}) == set()


# -- servers ---------------------------------------------------------------------------------

# vLLM 0.33, ChatCompletionRequest; in the last two lines those of versions since 0.6 that it has no more.
VLLM_CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
    reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p
    repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message
    add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
    structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
    routed_experts_prompt_start return_token_offsets return_prompt_text return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
    best_of guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
    structural_tag logits_processors
"""
# vLLM 0.33, CompletionRequest; in the last line those of versions since 0.6 that it has no more.
VLLM_COMPLETIONS = """
    model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
    length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
    logprob_token_ids bad_words prompt_embeds add_special_tokens response_format structured_outputs priority
    request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
    return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval
    best_of guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
    logits_processors
"""
# vLLM 0.33, PoolingBasicRequestMixin
VLLM_POOLING = """
    model user truncate_prompt_tokens padding truncation_side request_id priority mm_processor_kwargs cache_salt
"""
# vLLM 0.33, CompletionRequestMixin, ChatRequestOptionsMixin and ChatRequestMixin
VLLM_INPUTS = """
    input add_special_tokens messages add_generation_prompt continue_final_message chat_template
    chat_template_kwargs media_io_kwargs
"""
# vLLM 0.33, EmbedRequestMixin and EncodingRequestMixin; normalize of earlier versions
VLLM_EMBED = "encoding_format embed_dtype endianness dimensions use_activation normalize"
# vLLM 0.33, ScoreRequest and RerankRequest; softmax and activation of earlier versions
VLLM_SCORE = "text_1 text_2 data_1 data_2 queries documents items use_activation softmax activation"
VLLM_RERANK = "query documents top_n use_activation softmax activation"

# SGLang 0.5.23, ChatCompletionRequest and what its validators read
SGLANG_CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p user tools tool_choice
    parallel_tool_calls return_hidden_states return_routed_experts routed_experts_start_len
    return_cached_tokens_details return_prompt_token_ids return_token_ids return_meta_info reasoning_effort reasoning
    task top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos
    continue_final_message skip_special_tokens lora_path session_id session_params separate_reasoning
    stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video images_config
    custom_logit_processor custom_params input_ids rid extra_key cache_salt ngram_corpus_id priority bootstrap_host
    bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank data_parallel_rank
"""
# SGLang 0.5.23, CompletionRequest
SGLANG_COMPLETIONS = """
    model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options suffix temperature top_p user return_hidden_states return_routed_experts routed_experts_start_len
    return_cached_tokens_details return_spec_tokens_details return_token_ids top_k min_p min_tokens json_schema regex
    ebnf repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos skip_special_tokens lora_path session_id
    session_params response_format custom_params custom_logit_processor watermark images_config mm_processor_kwargs
    data_parallel_rank routed_dp_rank disagg_prefill_dp_rank bootstrap_host bootstrap_port bootstrap_room rid
    extra_key cache_salt priority custom_labels
"""
SGLANG_MESSAGE = "role content tool_call_id name reasoning_content tool_calls tools"
# SGLang 0.5.23, GenerateReqInput
SGLANG_GENERATE = """
    rid session_id text input_ids input_embeds image_data video_data audio_data mm_hashes mm_content_hashes
    use_audio_in_video video_config sampling_params return_logprob logprob_start_len top_logprobs_num
    token_ids_logprob return_sampling_mask return_text_in_logprobs return_flat_raw_top_logprobs
    return_flat_raw_top_logprobs_b64 stream log_metrics return_hidden_states return_routed_experts
    routed_experts_start_len return_indexer_topk modalities session_params lora_path lora_id custom_logit_processor
    positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size
    routed_dp_rank data_parallel_rank disagg_prefill_dp_rank kv_router_hint routing_key conversation_id
    http_worker_ipc background require_reasoning max_thinking_tokens priority extra_key no_logs custom_labels
    return_bytes return_entropy return_prompt_token_ids external_trace_header received_time need_wait_for_mm_inputs
    num_items_assigned encoder_urls max_dynamic_patch min_dynamic_patch image_max_dynamic_patch
    video_max_dynamic_patch images_config multi_item_delimiter_indices cache_salt
"""
# SGLang 0.5.23, EmbeddingReqInput: the body of /encode and /classify
SGLANG_ENCODE = """
    rid text input_ids input_embeds image_data video_data audio_data embed_override_token_id embed_overrides
    sampling_params log_metrics modalities is_cross_encoder_request lora_path lora_id positional_embed_overrides
    routing_key http_worker_ipc background priority dimensions return_pooled_hidden_states return_prompt_token_ids
    external_trace_header received_time multi_item_delimiter_indices
"""
# SGLang 0.5.23, EmbeddingRequest, ScoringRequest, V1RerankReqInput and ClassifyRequest
SGLANG_EMBEDDINGS = """
    input model encoding_format dimensions user rid priority lora_path embed_override_token_id embed_overrides
"""
SGLANG_SCORE = """
    query items embed_override_token_id query_embed_overrides item_embed_overrides label_token_ids apply_softmax
    item_first return_pooled_hidden_states model
"""
SGLANG_RERANK = "query documents instruct top_n return_documents"
SGLANG_CLASSIFY = "model input user rid priority"

# Jina's API, /v1/embeddings and /v1/rerank; max_query_length is of rank() of jina-reranker-v3.
# LlamaIndex calls embedding_type encoding_type.
JINA_EMBEDDINGS = """
    model input task dimensions normalized late_chunking embedding_type encoding_type truncate return_multivector
"""
JINA_RERANK = """
    model query documents top_n return_documents return_embeddings truncation max_doc_length max_query_length
"""
# Infinity 0.0.78, MultiModalOpenAIEmbedding and RerankInput
INFINITY_EMBEDDINGS = "input model encoding_format user modality dimensions"
INFINITY_RERANK = "query documents return_documents raw_scores model top_n"
# Text Embeddings Inference 1.9, EmbedRequest, OpenAICompatRequest and RerankRequest
TEI_EMBED = "inputs normalize prompt_name truncate truncation_direction dimensions"
# huggingface_hub 2.4, feature_extraction
HUB_EMBED = "inputs normalize prompt_name truncate truncation_direction dimensions encoding_format"
TEI_DECODE = "ids skip_special_tokens"
TEI_EMBEDDINGS = "input model user encoding_format dimensions"
TEI_RERANK = "query texts raw_scores return_text truncate truncation_direction"


@pytest.mark.parametrize(
    ("schema", "theirs"),
    [
        (ChatBody, VLLM_CHAT),
        (ChatBody, SGLANG_CHAT),
        (CompletionBody, VLLM_COMPLETIONS),
        (CompletionBody, SGLANG_COMPLETIONS),
        (ChatMessage, SGLANG_MESSAGE),
        (GenerateBody, SGLANG_GENERATE),
        (EncodeBody, SGLANG_ENCODE),
        (ClassifyBody, SGLANG_ENCODE),
        (EmbeddingsBody, VLLM_POOLING + VLLM_INPUTS + VLLM_EMBED),
        (EmbeddingsBody, SGLANG_EMBEDDINGS),
        (EmbeddingsBody, JINA_EMBEDDINGS),
        (EmbeddingsBody, INFINITY_EMBEDDINGS),
        (EmbeddingsBody, TEI_EMBEDDINGS),
        (EmbedBody, TEI_EMBED),
        (EmbedBody, HUB_EMBED),
        (DecodeBody, TEI_DECODE),
        (OpenAIClassifyBody, VLLM_POOLING + VLLM_INPUTS + "use_activation softmax activation"),
        (OpenAIClassifyBody, SGLANG_CLASSIFY),
        (RerankBody, VLLM_POOLING + VLLM_RERANK),
        (RerankBody, SGLANG_RERANK),
        (RerankBody, JINA_RERANK),
        (RerankBody, INFINITY_RERANK),
        (RerankBody, TEI_RERANK),
        (ScoreBody, VLLM_POOLING + VLLM_SCORE),
        (ScoreBody, SGLANG_SCORE),
    ],
)
def test_the_fields_of_other_servers_are_known(schema: type[Struct], theirs: str) -> None:
    assert unknown(schema, set(theirs.split())) == set()


def test_a_field_that_a_body_lacks_is_found() -> None:
    assert unknown(ChatBody, {"messages", "never_heard_of"}) == {"never_heard_of"}
