"""Formats of tool calls and of reasoning in a model's output: data for transformers' response parser, and its limits.

``templates.py`` has the formats, ``choose.py`` chooses one by the chat template, and ``reply_parser.py`` splits a reply
into reasoning, content and tool calls.
"""
