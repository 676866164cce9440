"""Outputs as models of each format write them, with what a client must get of them.

``BREAKING`` are the fragments of which the property tests make broken outputs.
"""

from __future__ import annotations

from typing import NamedTuple

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]}},
    "required": ["city"],
}
SCHEMAS = {
    "get_weather": WEATHER,
    "now": {"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "string"}}},
}
ZURICH, ROME = '{"city": "Zürich"}', '{"city": "Rome", "days": 3}'


class Recorded(NamedTuple):
    """An output after ``prompt``, of a model with these formats."""

    tool: str
    reasoning: str
    prompt: str
    output: str
    content: str
    thoughts: str
    calls: list[tuple[str, str]]


CHATML, LLAMA, DEEPSEEK = (
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<｜Assistant｜>",
)
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALLED = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

RECORDED = {
    "hermes-thinking": Recorded(
        "hermes", "qwen3", CHATML,
        "<think>\nThe user asks for the weather.\n</think>\n\nLet me look.\n"
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ZURICH}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
        "Let me look.", "The user asks for the weather.", [("get_weather", ZURICH), ("get_weather", ROME)],
    ),
    "hermes-no-thinking": Recorded(
        "hermes", "qwen3", CHATML + "<think>\n\n</think>\n\n", "It is 🌧 in Zürich.\n", "It is 🌧 in Zürich.", "", []
    ),
    "hermes-plain": Recorded("hermes", "none", CHATML, " A plain answer.\n\n", " A plain answer.\n\n", "", []),
    "hermes-text-between": Recorded(
        "qwen25", "none", CHATML,
        'A\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\nB\n<tool_call>\n{broken\n</tool_call> C',
        "A\nB\n<tool_call>\n{broken\n</tool_call> C", "", [("now", "{}")],
    ),
    "hermes-cut": Recorded(
        "hermes", "none", CHATML, 'Well <tool_call>\n{"name": "get_wea', 'Well <tool_call>\n{"name": "get_wea', "", []
    ),
    "hermes-arguments-as-text": Recorded(
        "hermes", "none", CHATML,
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"\\ud83c\\udf27\\"}"}</tool_call>',
        "", "", [("get_weather", '{"city": "🌧"}')],
    ),
    "qwen3-coder": Recorded(
        "qwen3_coder", "none", CHATML,
        "On it.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork </b>\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=units>\nC\n</parameter>\n</function>\n</tool_call>",
        "On it.", "", [("get_weather", '{"city": "New\\nYork </b>", "days": 3, "units": "C"}')],
    ),
    "llama3-marker": Recorded(
        "llama3", "none", LLAMA, f'<|python_tag|>{{"name": "get_weather", "parameters": {ROME}}}',
        "", "", [("get_weather", ROME)],
    ),
    "llama3-bare": Recorded(
        "llama3_json", "none", LLAMA,
        f'{{"name": "get_weather", "parameters": {ROME}}}; {{"name": "now", "parameters": {{}}}}',
        "", "", [("get_weather", ROME), ("now", "{}")],
    ),
    "llama3-other-json": Recorded(
        "llama3", "none", LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', "", []
    ),
    "mistral-array": Recorded(
        "mistral", "none", "[INST] hi [/INST]",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ROME}}}, {{"name": "now", "arguments": {{}}}}]',
        "", "", [("get_weather", ROME), ("now", "{}")],
    ),
    "mistral-names": Recorded(
        "mistral", "mistral", "[INST]hi[/INST]",
        f"[THINK]Two of them.[/THINK]Here:[TOOL_CALLS]get_weather[ARGS]{ROME}[TOOL_CALLS]get_weather{ZURICH}",
        "Here:", "Two of them.", [("get_weather", ROME), ("get_weather", ZURICH)],
    ),
    "deepseek-v3": Recorded(
        "deepseekv3", "deepseek-r1", DEEPSEEK,
        f"I need both.\n</think>\nOne moment.{BEGIN}{CALL}function{SEP}get_weather\n```json\n{ROME}\n```{CALLED}\n"
        f"{CALL}function{SEP}get_weather\n```json\n{ZURICH}\n```{CALLED}{END}",
        "One moment.", "I need both.", [("get_weather", ROME), ("get_weather", ZURICH)],
    ),
    "deepseek-v31": Recorded(
        "deepseekv31", "deepseek-v3", DEEPSEEK + "</think>", f"{BEGIN}{CALL}get_weather{SEP}{ROME}{CALLED}{END}",
        "", "", [("get_weather", ROME)],
    ),
    "harmony": Recorded(
        "gpt-oss", "gpt-oss", "<|start|>assistant",
        "<|channel|>analysis<|message|>Use the tool.<|end|><|start|>assistant<|channel|>commentary<|message|>Looking "
        "it up.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{ROME}<|call|>",
        "Looking it up.", "Use the tool.", [("get_weather", ROME)],
    ),
    "harmony-recipient-first": Recorded(
        "gpt-oss", "gpt-oss", "<|start|>assistant",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{ROME}", "", "", [("get_weather", ROME)],
    ),
    "harmony-answer": Recorded(
        "harmony", "gpt-oss", "<|start|>assistant",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>4 < 5",
        "4 < 5", "Easy.", [],
    ),
    "harmony-without-channel": Recorded(
        "gpt-oss", "gpt-oss", "<|start|>assistant", "<|message|>Hi.<|end|>", "<|message|>Hi.", "", []
    ),
    "harmony-plain": Recorded("gpt-oss", "gpt-oss", "<|start|>assistant", "No <b>channel.", "No <b>channel.", "", []),
    "harmony-other-channels": Recorded(
        "gpt-oss", "gpt-oss", "<|start|>assistant",
        "<|channel|>analysis<|message|>Run it.<|end|>?<|start|>assistant<|channel|>commentary to=python code<|message|>"
        "1+1<|call|><|start|>assistant<|channel|>final<|message|>2<|return|>.",
        "?<|channel|>commentary to=python code<|message|>1+12.", "Run it.", [],
    ),
    "harmony-cut": Recorded(
        "gpt-oss", "gpt-oss", "<|start|>assistant", "<|channel|>anal", "<|channel|>anal", "", []
    ),
    "harmony-only-tools": Recorded(
        "gpt-oss", "none", "<|start|>assistant",
        "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>"
        'json<|message|>{"a": "<|call|>\\"<|end|>"}<|call|>',
        "<|channel|>analysis<|message|>So.", "", [("now", '{"a": "<|call|>\\"<|end|>"}')],
    ),
    "hermes-cut-arguments": Recorded(
        "hermes", "none", CHATML, 'Well <tool_call>\n{"name": "get_weather", "arguments": {"city": "Z',
        "Well", "", [("get_weather", '{"city": "Z')],
    ),
    "hermes-marker-in-a-string": Recorded(
        "hermes", "none", CHATML,
        '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>\\\\", "b": "\\"</tool_call>"}}</tool_call> So',
        "So", "", [("now", '{"a": "</tool_call>\\\\", "b": "\\"</tool_call>"}')],
    ),
    "hermes-string-without-end": Recorded(
        "hermes", "none", CHATML,
        '<tool_call>{"name: "now"}\n</tool_call> So <tool_call>{"name": "now", "arguments": {}}</tool_call>',
        '<tool_call>{"name: "now"}\n</tool_call> So', "", [("now", "{}")],
    ),
    "hermes-escaped-quote": Recorded(
        "hermes", "none", CHATML,
        '<tool_call>{"name": "now", "arguments": {"b": "C:\\"}}</tool_call> So <tool_call>{"name": "now", "arguments": '
        '{"b": "</tool_call>" }}</tool_call><tool_call>{"name": "now", "arguments": {"b": "\\"}}</tool_call>\nBye',
        "So\nBye", "", [("now", '{"b": "C:\\"}}'), ("now", '{"b": "</tool_call>" }'), ("now", '{"b": "\\"}}')],
    ),
    "hermes-escaped-quote-at-the-end": Recorded(
        "hermes", "none", CHATML,
        '<tool_call>{"b": "\\"}</tool_call> So <tool_call>{"name": "now", "arguments": {"b": "\\"}}</tool_call> Bye',
        '<tool_call>{"b": "\\"}</tool_call> So Bye', "", [("now", '{"b": "\\"}}')],
    ),
    "qwen3-coder-json": Recorded(
        "qwen3_coder", "none", CHATML,
        '<tool_call>\n<function=now>\n<parameter=a>\n["</parameter>", {"</function>\\n</tool_call>": "\\""}]\n'
        '</parameter>\n<parameter=b>\n{5" wide\n</parameter>\n</function>\n</tool_call> So',
        "So", "", [("now", '{"a": ["</parameter>", {"</function>\\n</tool_call>": "\\""}], "b": "{5\\" wide"}')],
    ),
    "gemma4": Recorded(
        "gemma4", "gemma4", "<|turn>model\n",
        '<|channel>thought\nTwo.<channel|><|tool_call>call:get_weather{city:<|"|>a: b, {c:1}<|"|>,days:3}<tool_call|>'
        '<|tool_call>call:now{}<tool_call|>',
        "", "Two.", [("get_weather", '{"city": "a: b, {c:1}", "days": 3}'), ("now", "{}")],
    ),
    "gemma4-json": Recorded(
        "gemma4", "none", "<|turn>model\n", '<|tool_call>call:get_weather{"city": "{a:1,b:2}"}<tool_call|>',
        "", "", [("get_weather", '{"city": "{a:1,b:2}"}')],
    ),
    "gemma4-string-without-end": Recorded(
        "gemma4", "none", "<|turn>model\n",
        '<|tool_call>call:now{b:<|"|>x}<tool_call|><|tool_call>call:now{b:<|"|>y<tool_call|><|"|>}<tool_call|>',
        '<|tool_call>call:now{b:<|"|>x}<tool_call|>', "", [("now", '{"b": "y<tool_call|>"}')],
    ),
    "gemma4-quote": Recorded(
        "gemma4", "none", "<|turn>model\n", '<|tool_call>call:now{b:<|"|>a"<tool_call|>b<|"|>}<tool_call|>So',
        "So", "", [("now", '{"b": "a\\"<tool_call|>b"}')],
    ),
    "functiongemma": Recorded(
        "functiongemma", "none", "<start_of_turn>model\n",
        "<start_function_call>call:get_weather{city:<escape>Zürich<escape>}<end_function_call>",
        "", "", [("get_weather", ZURICH)],
    ),
    "glm": Recorded(
        "glm45", "glm45", "<|assistant|>",
        "<think>Look.</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "", "Look.", [("get_weather", ROME), ("now", "{}")],
    ),
    "kimi": Recorded(
        "kimi_k2", "none", "<|im_assistant|>assistant<|im_middle|>",
        "Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{ROME}<|tool_call_end|><|tool_calls_section_end|>",
        "Sure.", "", [("get_weather", ROME)],
    ),
    "kimi-escaped-quote": Recorded(
        "kimi_k2", "none", "<|im_assistant|>assistant<|im_middle|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>"
        '{"b": "C:\\"}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>'
        f"{ROME}<|tool_call_end|><|tool_calls_section_end|>",
        "", "", [("now", '{"b": "C:\\"}'), ("get_weather", ROME)],
    ),
}  # fmt: skip

BREAKING = [
    "a", " ", "\n", "<", "|", "{", "}", '"', '\\"', ",", "[", "]", "🙂", "é", "json", "functions.now",
    '{"name": "now", "arguments": {}}', '{"name": "\\ud800", "arguments": {}}',
    '{"name": "now", "arguments": {"x": 1e999}}', "[" * 2000, "\x01", ";",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "null", "=", ":",
]  # fmt: skip
