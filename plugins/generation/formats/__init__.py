"""Formats of tool calls and of reasoning in a model's output: data for transformers' response parser, and its limits.

``templates.py`` and ``reasoning_formats.py`` have the formats, ``choose.py`` chooses them by the chat template, and
``reply_parser.py`` splits a reply into reasoning, content and tool calls. For them, ``closing.py`` finds the ends of
calls, and ``streamed_calls.py`` reads arguments while they are written.
"""
