"""For routes: bodies, inputs, replies, streams, errors; the only part of the server that plugins may import.

Modules of core import from the files here. Every name is used by one of the project's own plugins or by the example.
"""

from __future__ import annotations

from trunkline.core.client.models import ModelQuery, named_or_primary
from trunkline.core.client.slices import run_in_slices
from trunkline.core.client.truncate import (
    Truncation,
    check_characters,
    clip_text,
    read_truncate,
    special_token_counts,
    too_long_error,
    truncate_ids,
)

from .bodies import DONE, AnyRequest, encode_json, error_frame, event_frame, is_draining, json_response, read_body
from .body_limits import InvalidBody
from .body_schemas import OpenAIPoolingBody, SGLangPoolingBody
from .chat_messages import ChatMessages, TemplateVariables, read_messages
from .chat_prompts import chat_prompt, takes_tools, template_options
from .chat_templates import contents_for_template, template_text
from .fields import (
    Ignored,
    IgnoredAccountingField,
    IgnoredMediaOption,
    IgnoredOverridesOption,
    IgnoredPlacementField,
    IgnoredTruncationSide,
    Refused,
    Unsupported,
    UnsupportedMedia,
    UnsupportedPadding,
    UnsupportedTruncateTokens,
    UnsupportedUnlessNull,
)
from .gather import item_meta, submit_and_wait, token_usage, wait_for_all
from .inputs import (
    Inputs,
    as_id_lists,
    assign_rids,
    check_batch_size,
    check_vocabulary,
    inputs_from_body,
    inputs_from_python,
    locate_errors,
    new_rid,
    read_salt,
)
from .media_types import HTML, JSON, SSE, TEXT
from .per_model import PerModel
from .prepare import PreparedInput, check_tokenizer, empty_text_error, prepare_inputs
from .reply_schemas import FinishReason, ItemMeta, OpenAIError, TruncationReport, Usage
from .streams import EventStream, while_connected

__all__ = [
    "DONE",
    "HTML",
    "JSON",
    "SSE",
    "TEXT",
    "AnyRequest",
    "ChatMessages",
    "EventStream",
    "FinishReason",
    "Ignored",
    "IgnoredAccountingField",
    "IgnoredMediaOption",
    "IgnoredOverridesOption",
    "IgnoredPlacementField",
    "IgnoredTruncationSide",
    "Inputs",
    "InvalidBody",
    "ItemMeta",
    "ModelQuery",
    "OpenAIError",
    "OpenAIPoolingBody",
    "PerModel",
    "PreparedInput",
    "Refused",
    "SGLangPoolingBody",
    "TemplateVariables",
    "Truncation",
    "TruncationReport",
    "Unsupported",
    "UnsupportedMedia",
    "UnsupportedPadding",
    "UnsupportedTruncateTokens",
    "UnsupportedUnlessNull",
    "Usage",
    "as_id_lists",
    "assign_rids",
    "chat_prompt",
    "check_batch_size",
    "check_characters",
    "check_tokenizer",
    "check_vocabulary",
    "clip_text",
    "contents_for_template",
    "empty_text_error",
    "encode_json",
    "error_frame",
    "event_frame",
    "inputs_from_body",
    "inputs_from_python",
    "is_draining",
    "item_meta",
    "json_response",
    "locate_errors",
    "named_or_primary",
    "new_rid",
    "prepare_inputs",
    "read_body",
    "read_messages",
    "read_salt",
    "read_truncate",
    "run_in_slices",
    "special_token_counts",
    "submit_and_wait",
    "takes_tools",
    "template_options",
    "template_text",
    "token_usage",
    "too_long_error",
    "truncate_ids",
    "wait_for_all",
    "while_connected",
]
