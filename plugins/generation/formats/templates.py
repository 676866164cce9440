"""The built-in formats of tool calls as fields of transformers' response templates.

All patterns are linear in the length of the text: they begin with a literal, and their repetitions are bounded or end
where the literal comes again. A field whose name begins with ``tool_calls`` has calls.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

NAME = r"(?P<name>[\w.\-]{1,128})"
JSON_VALUE = r'[\[{](?:[^"<\n]++|\n(?!<)|"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+")*+'
"""An array or object as the value of an element: strings may have the element's closing tag."""

CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
FUNCTION = {"type": "function", "function": "{content}"}


class ToolFormat(Struct, frozen=True, kw_only=True):
    """How a model writes tool calls.

    ``detect``: strings in chat templates, one of which chooses the format if ``requires`` is there, too. ``fields``: of
    the response template.
    ``content_close``: markers that are left out of the content. ``call``: what a forced call looks like, with the
    placeholders ``{name}`` and ``{arguments}``; ``separator`` is between two calls, ``begin`` and ``end`` are around
    all. ``values``: how arguments are written: "json", or "qwen" and "glm" for one XML-like element per argument.
    ``explained``: where a chat template takes no tools, the system message can explain this format to the model.
    ``bare``: a call may also be a JSON object without a marker, at the beginning of the output.
    """

    aliases: tuple[str, ...] = ()
    detect: tuple[str, ...]
    requires: str = ""
    fields: dict[str, dict[str, Any]]
    content_close: tuple[str, ...] = ()
    call: str
    begin: str = ""
    separator: str = "\n"
    end: str = ""
    values: str = "json"
    explained: bool = False
    bare: bool = False
    short_ids: bool = False  # ids of calls have nine letters and digits


_MISTRAL: dict[str, dict[str, Any]] = {
    "tool_calls": {
        "open_pattern": rf"\[TOOL_CALLS\]{NAME}(?:\[CALL_ID\]\w{{1,32}})?(?:\[ARGS\]|(?=\{{))",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        "content": "json",
        "transform": CALL,
    },
    "tool_calls_array": {"open_pattern": r"\[TOOL_CALLS\](?= ?\[)", "repeats": True, "content": "json"},
}

TOOL_FORMATS = {
    "gpt-oss": ToolFormat(
        aliases=("openai", "harmony"),
        detect=("<|constrain|>", "<|channel|>commentary"),
        fields={
            "tool_calls": {
                "open_pattern": (
                    r"(?:<\|start\|>assistant)?"
                    rf"(?: ?to=functions\.{NAME}<\|channel\|>commentary|<\|channel\|>commentary to=functions\.{NAME})"
                    r" ?(?:<\|constrain\|>)?(?:json)? ?<\|message\|>"
                ),
                "close": ["<|call|>", "<|end|>"],
                "repeats": True,
                "content": "json",
                "transform": CALL,
            },
            "content": {
                "open_pattern": r"<\|channel\|>(?:final|commentary)(?: ?<\|constrain\|>[\w.\-]{0,64})?<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "content": "text",
            },
        },
        content_close=("<|start|>assistant", "<|end|>", "<|return|>", "<|call|>"),
        call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>",
        separator="<|start|>assistant",
    ),
    "gemma4": ToolFormat(
        detect=("<|tool_call>",),
        fields={
            "tool_calls": {
                "open_pattern": rf"<\|tool_call>call:{NAME}",
                "close": "<tool_call|>",
                "repeats": True,
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
                "transform": CALL,
            }
        },
        content_close=("<turn|>", "<|tool_response>"),
        call="<|tool_call>call:{name}{arguments}<tool_call|>",
        separator="",
    ),
    "functiongemma": ToolFormat(
        aliases=("gemma",),
        detect=("<start_function_call>",),
        fields={
            "tool_calls": {
                "open_pattern": rf"<start_function_call>call:{NAME}",
                "close": "<end_function_call>",
                "repeats": True,
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [["<escape>", "<escape>"]]},
                "transform": CALL,
            }
        },
        content_close=("<end_of_turn>", "<start_function_response>"),
        call="<start_function_call>call:{name}{arguments}<end_function_call>",
        separator="",
    ),
    "kimi_k2": ToolFormat(
        detect=("<|tool_call_begin|>",),
        fields={
            "tool_calls": {
                "open_pattern": (
                    rf"<\|tool_call_begin\|>(?:functions\.)?{NAME}:\d{{1,4}}[ \n]?<\|tool_call_argument_begin\|>"
                ),
                "close": "<|tool_call_end|>",
                "repeats": True,
                "content": "json",
                "transform": CALL,
            }
        },
        content_close=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        call="<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
        begin="<|tool_calls_section_begin|>",
        separator="",
        end="<|tool_calls_section_end|>",
    ),
    "deepseekv3": ToolFormat(
        aliases=("deepseek", "deepseek_v3"),
        detect=("```json",),
        requires="<｜tool▁call▁begin｜>",
        fields={
            "tool_calls": {
                "open_pattern": r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n<]{1,128})\n```json\n",
                "close": ["\n```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"],
                "repeats": True,
                "content": "json",
                "transform": CALL,
            }
        },
        content_close=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    "deepseekv31": ToolFormat(
        aliases=("deepseek_v31",),
        detect=("<｜tool▁call▁begin｜>",),
        fields={
            "tool_calls": {
                "open_pattern": r"<｜tool▁call▁begin｜>(?P<name>[^\n<]{1,128})<｜tool▁sep｜>",
                "close": "<｜tool▁call▁end｜>",
                "repeats": True,
                "content": "json",
                "transform": CALL,
            }
        },
        content_close=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        separator="",
        end="<｜tool▁calls▁end｜>",
    ),
    "glm45": ToolFormat(
        aliases=("glm", "glm47"),
        detect=("<arg_key>",),
        fields={
            "tool_calls": {
                "open_pattern": r"<tool_call>\n?(?P<name>[^\s<{]{1,128})",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": (
                        r"<arg_key>(?P<key>[^<]{1,256})</arg_key>\s{0,8}"
                        rf"<arg_value>(?P<value>{JSON_VALUE}(?=</arg_value>)|(?:(?!<arg_key>).)*?)</arg_value>"
                    )
                },
                "transform": CALL,
            }
        },
        call="<tool_call>{name}\n{arguments}</tool_call>",
        values="glm",
    ),
    "qwen3_coder": ToolFormat(
        aliases=("qwen3_xml",),
        detect=("<function=",),
        fields={
            "tool_calls": {
                "open_pattern": r"<tool_call>\s{0,8}<function=(?P<name>[^>\n]{1,128})>",
                "close_pattern": r"</function>\s{0,8}</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": (
                        r"<parameter=(?P<key>[^>\n]{1,256})>\n?"
                        rf"(?P<value>{JSON_VALUE}(?=\n?</parameter>)|(?:(?!<parameter=).)*?)\n?</parameter>"
                    )
                },
                "transform": CALL,
            }
        },
        call="<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
        values="qwen",
    ),
    "mistral": ToolFormat(
        detect=("[ARGS]",),
        requires="[TOOL_CALLS]",
        fields=_MISTRAL,
        call="[TOOL_CALLS]{name}[ARGS]{arguments}",
        separator="",
        short_ids=True,
    ),
    "mistral_v3": ToolFormat(
        detect=("[TOOL_CALLS]",),
        fields=_MISTRAL,
        call='{{"name": "{name}", "arguments": {arguments}}}',
        begin="[TOOL_CALLS][",
        separator=", ",
        end="]",
        short_ids=True,
    ),
    "hermes": ToolFormat(
        aliases=("qwen", "qwen25"),
        detect=("<tool_call>",),
        fields={
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": FUNCTION,
            }
        },
        call='<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
        explained=True,
    ),
    "llama3": ToolFormat(
        aliases=("llama3_json", "llama4_json"),
        detect=("<|python_tag|>", '{"name": function name, "parameters"'),
        fields={"tool_calls": {"open": "<|python_tag|>", "repeats": True, "content": "text"}},
        content_close=("<|eom_id|>", "<|eot_id|>"),
        call='{{"name": "{name}", "parameters": {arguments}}}',
        separator="; ",
        bare=True,
    ),
}
"""By name; the first whose ``detect`` occurs in the chat template is chosen."""

ANCHORS = (
    "<|im_start|>assistant", "<|start|>assistant", "<|start_header_id|>assistant<|end_header_id|>", "<|assistant|>",
    "<｜Assistant｜>", "[/INST]", "<|turn>model\n", "<start_of_turn>model\n", "<|im_assistant|>assistant<|im_middle|>",
    "<|start_of_role|>assistant<|end_of_role|>",
)  # fmt: skip
"""Where the assistant's message begins in a prompt, in the chat templates of the formats above."""
