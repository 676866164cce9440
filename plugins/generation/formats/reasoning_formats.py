"""The built-in formats of reasoning as fields of transformers' response templates. See ``templates.py``."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class ReasoningFormat(Struct, frozen=True, kw_only=True):
    """How a model writes its reasoning; ``detect`` and ``requires`` as for ToolFormat.

    ``text``: what is before and after the reasoning of a reply whose calls are forced. ``begins_open``: the output
    begins inside of it, without the marker.
    """

    aliases: tuple[str, ...] = ()
    detect: tuple[str, ...] = ()
    requires: str = ""
    field: dict[str, Any]
    text: tuple[str, str] = ("<think>", "</think>")
    begins_open: str = ""


_THINK = {"open": "<think>", "close": "</think>", "content": "text"}

REASONING_FORMATS = {
    "gpt-oss": ReasoningFormat(
        aliases=("openai_gptoss",),
        detect=("<|channel|>analysis",),
        field={
            "open_pattern": r"<\|channel\|>analysis[^<]{0,128}<\|message\|>",
            "close": ["<|end|>", "<|call|>", "<|return|>"],
            "content": "text",
        },
        text=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    "gemma4": ReasoningFormat(
        detect=("<|channel>thought",),
        field={"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
        text=("<|channel>thought\n", "<channel|>"),
    ),
    "mistral": ReasoningFormat(
        detect=("[THINK]",),
        field={"open": "[THINK]", "close": "[/THINK]", "content": "text"},
        text=("[THINK]", "[/THINK]"),
    ),
    "qwen3": ReasoningFormat(
        aliases=("think", "glm45", "deepseek-v3", "kimi_k2", "nano_v3"), detect=("<think>", "</think>"), field=_THINK
    ),
    "deepseek-r1": ReasoningFormat(aliases=("deepseek_r1", "qwen3-thinking"), field=_THINK, begins_open="<think>"),
}
"""By name; the first whose ``detect`` occurs in the chat template is chosen."""
