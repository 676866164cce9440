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
from .chat_prompts import chat_prompt, template_options
from .chat_templates import shape_contents
from .fields import (
    Accounting,
    Ignored,
    MediaOption,
    OnlyNull,
    OverridesOption,
    Padding,
    Placement,
    Refused,
    TruncateTokens,
    TruncationSide,
    Unsupported,
    UnsupportedMedia,
)
from .gather import item_meta, run_all, token_usage, wait_for_all
from .inputs import (
    Inputs,
    as_id_lists,
    assign_rids,
    check_batch,
    check_vocabulary,
    locate_errors,
    new_rid,
    parse_inputs,
    read_inputs,
    read_salt,
)
from .media_types import HTML, JSON, SSE, TEXT
from .per_model import PerModel
from .prepare import PreparedInput, check_tokenizer, empty_text, prepare_inputs
from .reply_schemas import FinishReason, ItemMeta, OpenAIError, TruncationReport, Usage
from .streams import EventStream, while_connected

__all__ = [
    "DONE",
    "HTML",
    "JSON",
    "SSE",
    "TEXT",
    "Accounting",
    "AnyRequest",
    "ChatMessages",
    "EventStream",
    "FinishReason",
    "Ignored",
    "Inputs",
    "InvalidBody",
    "ItemMeta",
    "MediaOption",
    "ModelQuery",
    "OnlyNull",
    "OpenAIError",
    "OpenAIPoolingBody",
    "OverridesOption",
    "Padding",
    "PerModel",
    "Placement",
    "PreparedInput",
    "Refused",
    "SGLangPoolingBody",
    "TemplateVariables",
    "TruncateTokens",
    "Truncation",
    "TruncationReport",
    "TruncationSide",
    "Unsupported",
    "UnsupportedMedia",
    "Usage",
    "as_id_lists",
    "assign_rids",
    "chat_prompt",
    "check_batch",
    "check_characters",
    "check_tokenizer",
    "check_vocabulary",
    "clip_text",
    "empty_text",
    "encode_json",
    "error_frame",
    "event_frame",
    "is_draining",
    "item_meta",
    "json_response",
    "locate_errors",
    "named_or_primary",
    "new_rid",
    "parse_inputs",
    "prepare_inputs",
    "read_body",
    "read_inputs",
    "read_messages",
    "read_salt",
    "read_truncate",
    "run_all",
    "run_in_slices",
    "shape_contents",
    "special_token_counts",
    "template_options",
    "token_usage",
    "too_long_error",
    "truncate_ids",
    "wait_for_all",
    "while_connected",
]
