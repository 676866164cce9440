"""What every route needs, once: bodies, inputs, replies, event streams, errors, clients that hang up.

The only part of the server that plugins import.
"""

from __future__ import annotations

from trunkline.core.client.models import ModelQuery, asked_about, choose
from trunkline.core.client.slices import run_in_slices
from trunkline.core.client.truncate import (
    Truncation,
    check_characters,
    clip_text,
    fit,
    read_truncate,
    special_ends,
    too_long,
)

from .bodies import (
    DEFAULT_TIMEOUT,
    DONE,
    AnyRequest,
    ClientGone,
    dialect_of,
    encode,
    error_frame,
    error_response,
    error_status,
    is_draining,
    json_response,
    read_body,
    read_bytes,
    render_error,
    sse,
)
from .body_limits import InvalidBody
from .body_schemas import OpenAIPoolingBody, SGLangPoolingBody
from .chat_templates import shape_contents, template_variables
from .deadline import TEMPLATE_SECONDS, TookTooLong, deadline
from .fields import (
    Accounting,
    Ignored,
    Later,
    Media,
    MediaOption,
    OnlyNull,
    OverridesOption,
    Padding,
    Placement,
    Refused,
    TruncateTokens,
    TruncationSide,
)
from .gather import all_over, item_meta, run_all, token_usage
from .inputs import (
    Inputs,
    check_batch,
    check_vocabulary,
    named,
    naming,
    new_rid,
    read_inputs,
    read_salt,
    sort_inputs,
    spread_ids,
    spread_rids,
)
from .media_types import HTML, JSON, SSE, TEXT
from .per_model import PerModel
from .prepare import Item, Shaper, check_tokenizer, encode_pair, prepare
from .reply_schemas import CachedTokens, Cut, FinishReason, ItemMeta, OpenAIError, Usage
from .streams import ABORT_EXTENSION, EventStream, while_connected

__all__ = [
    "ABORT_EXTENSION",
    "DEFAULT_TIMEOUT",
    "DONE",
    "HTML",
    "JSON",
    "SSE",
    "TEMPLATE_SECONDS",
    "TEXT",
    "Accounting",
    "AnyRequest",
    "CachedTokens",
    "ClientGone",
    "Cut",
    "EventStream",
    "FinishReason",
    "Ignored",
    "Inputs",
    "InvalidBody",
    "Item",
    "ItemMeta",
    "Later",
    "Media",
    "MediaOption",
    "ModelQuery",
    "OnlyNull",
    "OpenAIError",
    "OpenAIPoolingBody",
    "OverridesOption",
    "Padding",
    "PerModel",
    "Placement",
    "Refused",
    "SGLangPoolingBody",
    "Shaper",
    "TookTooLong",
    "TruncateTokens",
    "Truncation",
    "TruncationSide",
    "Usage",
    "all_over",
    "asked_about",
    "check_batch",
    "check_characters",
    "check_tokenizer",
    "check_vocabulary",
    "choose",
    "clip_text",
    "deadline",
    "dialect_of",
    "encode",
    "encode_pair",
    "error_frame",
    "error_response",
    "error_status",
    "fit",
    "is_draining",
    "item_meta",
    "json_response",
    "named",
    "naming",
    "new_rid",
    "prepare",
    "read_body",
    "read_bytes",
    "read_inputs",
    "read_salt",
    "read_truncate",
    "render_error",
    "run_all",
    "run_in_slices",
    "shape_contents",
    "sort_inputs",
    "special_ends",
    "spread_ids",
    "spread_rids",
    "sse",
    "template_variables",
    "token_usage",
    "too_long",
    "while_connected",
]
