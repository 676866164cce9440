"""Options of ``/v1/chat/completions`` that change the prompt or the limit, against transformers' own rendering."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.plugins.generation.openai import requests
from tests.plugins.generation.openai.requests import USER
from trunkline.plugins.generation.schemas import GenerationParams

pytestmark = pytest.mark.field

ASSISTANT = {"role": "assistant", "content": "the quick"}
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VARIABLES = (
    "{{ messages[0].content }}|{{ reasoning_effort }}|{{ enable_thinking }}|{{ extra and extra.deep }}|"
    "{{ messages[0].reasoning_content }}|{{ messages[0].name }}|{{ messages[0].tool_call_id }}"
)


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await requests.chat(client, **{"max_tokens": 1, **body})


async def prompt(client: httpx.AsyncClient, engine: Any, **body: Any) -> str:
    """The prompt that is submitted, as text."""
    answer = await chat(client, **body)
    assert answer.status_code == 200, answer.text
    return str(engine.tokenizer("").decode(engine.items[-1].prompt, skip_special_tokens=False))


async def refusal(client: httpx.AsyncClient, **body: Any) -> tuple[str, str]:
    """Message and field of a 400."""
    answer = await chat(client, **body)
    assert answer.status_code == 400, answer.text
    told = answer.json()
    return told["message"], told["param"]


@pytest.fixture
def template(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``template(text)`` sets the model's chat template."""
    return lambda text: monkeypatch.setattr(byte_level, "chat_template", text)


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]])
async def test_a_template_for_parts_of_text(
    client: httpx.AsyncClient, engine: Any, byte_level: Any, template: Any, content: Any
) -> None:
    template(PARTS)
    messages = [{"role": "user", "content": content}, ASSISTANT, USER]
    listed = [[{"type": "text", "text": text}] for text in ("hello", "the quick", "hello")]
    theirs = [{"role": m["role"], "content": text} for m, text in zip(messages, listed, strict=True)]
    expected = byte_level.apply_chat_template(theirs, tokenize=False, add_generation_prompt=True)
    assert await prompt(client, engine, messages=messages) == expected
    assert expected.count("hello") == 2


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": None}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
        ({"continue_final_message": False}, {"add_generation_prompt": True}),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
async def test_the_end_of_the_prompt(
    client: httpx.AsyncClient,
    engine: Any,
    byte_level: Any,
    template: Any,
    options: dict[str, Any],
    theirs: dict[str, Any],
    parts: bool,
) -> None:
    messages: list[dict[str, Any]] = [USER, ASSISTANT]
    ours = await prompt(client, engine, messages=messages, **options)
    assert ours == byte_level.apply_chat_template(messages, tokenize=False, **theirs)
    assert ours.endswith("the quick") == ("continue_final_message" in theirs)
    if parts:
        template(PARTS)
        assert await prompt(client, engine, messages=messages, **options) == ours


async def test_continue_final_message_excludes_add_generation_prompt(client: httpx.AsyncClient) -> None:
    message, param = await refusal(client, continue_final_message=True, add_generation_prompt=True)
    assert message.startswith("continue_final_message and add_generation_prompt can't both be true")
    assert param == "continue_final_message"


async def test_a_final_message_that_the_template_changes_can_t_be_continued(
    client: httpx.AsyncClient, template: Any
) -> None:
    template("{{ messages[0].content | upper }}")
    message, _ = await refusal(client, continue_final_message=True)
    assert message.startswith("The model's chat template refused the messages: continue_final_message is set but")


async def test_the_error_of_a_template_is_short(client: httpx.AsyncClient, template: Any) -> None:
    template("{{ raise_exception(messages[0].content) }}")
    message, _ = await refusal(client, messages=[{"role": "user", "content": "x" * 100_000}])
    assert len(message) < 1000


async def test_a_template_from_the_client_is_refused(client: httpx.AsyncClient) -> None:
    message, param = await refusal(client, chat_template="{{ messages }}")
    assert message == "chat_template can't be sent: the server takes templates from its operator only " + (
        "(--chat-template FILE)."
    )
    assert param == "chat_template"


async def test_template_variables(client: httpx.AsyncClient, engine: Any, template: Any) -> None:
    template(VARIABLES)
    assert await prompt(client, engine) == "hello||||||"
    given = {"enable_thinking": False, "extra": {"deep": [1]}, "unread": "x"}
    assert await prompt(client, engine, chat_template_kwargs=given) == "hello||False|[1]|||"


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "return_dict", "tokenizer_kwargs", "self"),
    ],
)
async def test_template_variables_cannot_replace_those_of_the_server(
    client: httpx.AsyncClient, engine: Any, name: str
) -> None:
    message, param = await refusal(client, chat_template_kwargs={"enable_thinking": False, name: []})
    assert message.startswith(f"chat_template_kwargs can't set {name};")
    assert param == "chat_template_kwargs"
    assert engine.items == []


@pytest.mark.parametrize("given", ["{{ x }}", [1], {str(number): 1 for number in range(65)}])
async def test_template_variables_are_limited(client: httpx.AsyncClient, given: Any) -> None:
    answer = await chat(client, chat_template_kwargs=given)
    assert answer.status_code == 400
    assert "`$.chat_template_kwargs`" in answer.json()["message"]


async def test_reasoning_effort(client: httpx.AsyncClient, engine: Any, template: Any) -> None:
    message, param = await refusal(client, reasoning_effort="high")
    assert message.startswith("The model's chat template has no reasoning_effort; leave it out")
    assert param == "reasoning_effort"
    assert "hello" in await prompt(client, engine, reasoning_effort="none")  # which a model without reasoning does
    template(VARIABLES)
    assert await prompt(client, engine, reasoning_effort="high") == "hello|high|||||"
    assert await prompt(client, engine, reasoning_effort="none") == "hello|none|False||||"
    own = {"enable_thinking": True}
    assert await prompt(client, engine, reasoning_effort="none", chat_template_kwargs=own) == "hello|none|True||||"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
async def test_fields_of_messages_reach_the_template(
    client: httpx.AsyncClient, engine: Any, template: Any, name: str
) -> None:
    template(VARIABLES)
    message = USER | {name: "because", "name": "me", "tool_call_id": "call_1", "unknown": 1, "tool_calls": None}
    assert await prompt(client, engine, messages=[message]) == "hello||||because|me|call_1"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"audio": {"id": "x"}}, "messages[0].audio"),
        ({"refusal": "no"}, "messages[0].refusal"),
    ],
)
async def test_fields_of_messages_that_are_refused(
    client: httpx.AsyncClient, message: dict[str, Any], param: str
) -> None:
    assert (await refusal(client, messages=[ASSISTANT | message]))[1] == param


async def test_a_message_of_the_openai_sdk_can_be_sent_back(client: httpx.AsyncClient) -> None:
    """``message.model_dump()`` has all fields, most of which are null."""
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    assert (await chat(client, messages=[USER, ASSISTANT | nulls, USER])).status_code == 200


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": ""}, "messages[1].role"),
        ({"content": 5}, "messages[1].content"),
        ({"content": None}, "messages[1].content"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "messages[1].content[1]"),
        ({"content": ["a"]}, "messages[1].content[0]"),
    ],
)
async def test_an_error_of_a_message_has_its_index(
    client: httpx.AsyncClient, message: dict[str, Any], param: str
) -> None:
    text, named = await refusal(client, messages=[ASSISTANT, {"role": "user", "content": "x", **message}])
    assert named == param
    assert text.startswith(param)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_minus_one_is_no_limit(client: httpx.AsyncClient, engine: Any, field: str) -> None:
    await chat(client, **{"max_tokens": None, field: -1})
    await chat(client, max_tokens=None)
    unlimited, default = (item.params.max_new_tokens for item in engine.items)
    assert unlimited == default == 100 - 2 - len(engine.items[0].prompt)


async def test_minus_one_overrides_the_server_s_preferred_limit(engine: Any, make_app: Any) -> None:
    app = make_app(engine, preferred_sampling_params='{"max_new_tokens": 5}')
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for limit in (None, -1, 7):
            await chat(client, max_tokens=limit)
    preferred, unlimited, own = (item.params.max_new_tokens for item in engine.items)
    assert (preferred, own) == (5, 7)
    assert unlimited > 50


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_regex": ["x"] * 33}, "stop_regex"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0.5}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
    ],
)
async def test_errors_name_the_field_as_it_was_sent(
    client: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    message, param = await refusal(client, **body)
    assert field in message
    assert param in (field, None)  # None: the body can't be decoded, and the message has the path
    for other in ("max_new_tokens", "min_new_tokens", "sampling_seed", "max_completion_tokens"):
        assert other == field or other not in message


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, engine: Any) -> None:
    """Sampling parameters in a chat body, under OpenAI's and SGLang's names."""
    given: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.25,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100, "07": 2.5},
        "min_tokens": 2,
        "stop_regex": ["a+", "b"],
        "custom_params": {"deep": [1, {"x": None}]},
    }
    assert (await chat(client, **{**given, "max_tokens": 3})).status_code == 200
    params = engine.items[-1].params
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -0.25, 1.25)
    assert params.logit_bias == ((5, -100.0), (7, 2.5))
    assert (params.min_new_tokens, params.stop_regex) == (2, ("a+", "b"))
    assert params.custom_params == given["custom_params"]
    assert (await chat(client, **dict.fromkeys(given))).status_code == 200
    nulls = engine.items[-1].params
    assert nulls == GenerationParams(max_new_tokens=1, temperature=0.7, seed=nulls.seed)


async def test_usage_in_every_chunk_on_request(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("the fox")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = requests.chunks_of(await chat(client, stream=True, stream_options=options, n=2))
    for index in range(2):
        own = [chunk["usage"] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in own]
        assert (counts[0], counts[-1]) == (0, len(engine.replies[-1].tokens))
        assert counts == sorted(counts)
        assert len(set(counts)) > 2
        assert {usage["prompt_tokens"] for usage in own} == {len(engine.items[-1].prompt)}
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(engine.replies[-1].tokens)


async def test_extra_key_separates_cache_entries(client: httpx.AsyncClient, engine: Any) -> None:
    await chat(client, extra_key="a")
    await chat(client, extra_key="a", cache_salt="b")
    assert [item.salt for item in engine.items] == [b"a", b"a\xffb"]
