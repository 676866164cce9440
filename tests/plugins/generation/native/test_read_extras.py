"""Extra outputs in bodies: values for all prompts or for each, invalid values, and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from trunkline.plugins.generation.native import read_extras
from trunkline.plugins.generation.schemas import LogprobParams

pytestmark = pytest.mark.field

OFF = "The server is not configured to return the hidden states. Please set `--enable-return-hidden-states` to enable "


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/generate", json=body)


def requested_logprobs(engine: Any) -> list[LogprobParams | None]:
    """The logprobs parameters of each submitted sequence."""
    return [item.params.logprobs for item in engine.items]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, LogprobParams()),
        ({"logprob_start_len": None, "top_logprobs_num": None, "token_ids_logprob": None}, LogprobParams()),
        ({"logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": []}, LogprobParams()),
        ({"logprob_start_len": 0}, LogprobParams(0)),
        ({"logprob_start_len": 3, "top_logprobs_num": 50}, LogprobParams(3, 50)),
        ({"logprob_start_len": "2", "top_logprobs_num": 1.0}, LogprobParams(2, 1)),
        ({"token_ids_logprob": [5, 0, 5]}, LogprobParams(None, 0, (5, 0, 5))),
        ({"token_ids_logprob": 7}, LogprobParams(None, 0, (7,))),
        ({"return_logprob": "true"}, LogprobParams()),
        ({"return_logprob": [True]}, LogprobParams()),
    ],
)
async def test_a_single_prompt(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], expected: LogprobParams
) -> None:
    answer = await post(client, **{"input_ids": [1, 2, 3], "return_logprob": True} | body)
    assert answer.status_code == 200, answer.text
    assert requested_logprobs(engine) == [expected]


async def test_values_for_all_prompts_and_for_each(client: httpx.AsyncClient, engine: Any) -> None:
    body = {
        "input_ids": [[1, 2, 3], [4, 5], [6]],
        "return_logprob": [True, False, True],
        "logprob_start_len": [2, 9, None],
        "top_logprobs_num": 2,
        "token_ids_logprob": [[1], [2, 3], None],
    }
    assert (await post(client, **body)).status_code == 200
    assert requested_logprobs(engine) == [LogprobParams(2, 2, (1,)), None, LogprobParams(None, 2, ())]


async def test_a_batch_whose_token_ids_are_all_null(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"input_ids": [[1, 2, 3], [4, 5]], "return_logprob": True, "token_ids_logprob": [None, None]}
    assert (await post(client, **body)).status_code == 200
    assert requested_logprobs(engine) == [LogprobParams(), LogprobParams()]


async def test_options_without_return_logprob_ask_for_nothing(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"logprob_start_len": 99, "top_logprobs_num": 99, "token_ids_logprob": [10**6], "return_text_in_logprobs": 1}
    answer = await post(client, input_ids=[1, 2], return_logprob=False, **body)
    assert answer.status_code == 200
    assert requested_logprobs(engine) == [None]
    assert not {name for name in answer.json()["meta_info"] if "logprob" in name}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"logprob_start_len": 4},
            "req.logprob_start_len=4 is higher than the number of input tokens len(req.origin_input_ids)=3. "
            "Please use a smaller logprob_start_len.",
        ),
        ({"logprob_start_len": -2}, "logprob_start_len must be -1 (output tokens only) or at least 0, got -2."),
        ({"top_logprobs_num": 51}, "top_logprobs_num must be at most 50, got 51."),
        ({"top_logprobs_num": -1}, "top_logprobs_num must be at least 0, got -1."),
        (
            {"token_ids_logprob": [5, 322]},
            "token_ids_logprob contains out-of-vocabulary token id 322; valid range is [0, 322).",
        ),
        (
            {"token_ids_logprob": [-1]},
            "token_ids_logprob contains out-of-vocabulary token id -1; valid range is [0, 322).",
        ),
        ({"token_ids_logprob": [[1]]}, "token_ids_logprob must be a flat list of integers."),
        ({"token_ids_logprob": [1, [2]]}, "token_ids_logprob must be a flat list of integers."),
        ({"token_ids_logprob": [1, None]}, "token_ids_logprob must be a flat list of integers."),
        ({"token_ids_logprob": [1] * 1025}, "token_ids_logprob may have at most 1024 ids, got 1025."),
        ({"return_logprob": [True, True]}, "return_logprob has 2 entries for a batch of 1; give one value, or one per"),
        ({"top_logprobs_num": [1, 2]}, "top_logprobs_num has 2 entries for a batch of 1"),
        ({"return_hidden_states": True}, OFF),
        ({"return_hidden_states": "last"}, OFF),
        ({"return_hidden_states": "first"}, "return_hidden_states must be a boolean or the string literal 'last'."),
        (
            {"return_hidden_states": [False, False]},
            "The length of return_hidden_states should be equal to the batch size.",
        ),
        ({"return_routed_experts": True}, "return_routed_experts needs a MoE model (mixture of experts), and fake is"),
    ],
)
async def test_refused(client: httpx.AsyncClient, engine: Any, body: dict[str, Any], message: str) -> None:
    answer = await post(client, **{"input_ids": [1, 2, 3], "return_logprob": True} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)
    assert engine.items == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_logprob", [True]),
        ("logprob_start_len", [0]),
        ("top_logprobs_num", [1]),
        ("token_ids_logprob", [[1]]),
        ("custom_logit_processor", [None]),
    ],
)
async def test_lists_and_samples_exclude_each_other(
    client: httpx.AsyncClient, engine: Any, name: str, value: Any
) -> None:
    body = {"input_ids": [[1, 2]], "return_logprob": True, "sampling_params": {"n": 2}} | {name: value}
    answer = await post(client, **body)
    assert answer.status_code == 400
    assert answer.json() == {"error": {"message": f"Cannot use list {name} with parallel_sample_num > 1"}}
    assert engine.items == []


@pytest.mark.parametrize("body", [{"top_logprobs_num": "many"}, {"token_ids_logprob": ["x"]}, {"return_logprob": 3}])
async def test_wrong_types_are_errors_of_the_body(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await post(client, **{"input_ids": [1], "return_logprob": True} | body)
    assert (answer.status_code, answer.json()["object"], answer.json()["code"]) == (400, "error", 400)


async def test_an_error_names_the_prompt_of_a_batch(client: httpx.AsyncClient) -> None:
    body = {"input_ids": [[1, 2, 3], [1]], "return_logprob": True, "logprob_start_len": 2}
    message = (await post(client, **body)).json()["error"]["message"]
    assert message.startswith("input_ids[1]: req.logprob_start_len=2 is higher than")


@pytest.mark.parametrize(
    ("value", "modes"),
    [
        (True, ["all", "all"]),
        ("last", ["last", "last"]),
        ([False, "last"], ["", "last"]),
        ([None, True], ["", "all"]),
        ("false", ["", ""]),
        ("True", ["all", "all"]),
        (None, ["", ""]),
    ],
)
async def test_hidden_states_where_they_are_enabled(
    engine: Any, make_app: Callable[..., Any], value: Any, modes: list[str]
) -> None:
    app = make_app(engine, enable_return_hidden_states=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await post(client, input_ids=[[1], [2]], return_hidden_states=value)
    assert answer.status_code == 200, answer.text
    assert [item.params.hidden_states for item in engine.items] == modes


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            -1,
            "recv_req.routed_experts_start_len=-1 is lower than 0. Please use a non-negative routed_experts_start_len.",
        ),
        (
            4,
            "recv_req.routed_experts_start_len=4 is higher than the number of input tokens "
            "len(req.origin_input_ids)=3. Please use a smaller routed_experts_start_len.",
        ),
        (3, ""),
        (None, ""),
    ],
)
async def test_routed_experts(
    make_engine: Callable[..., Any], make_app: Callable[..., Any], start: int | None, message: str
) -> None:
    engine = make_engine()
    engine.models[0] = msgspec.structs.replace(
        engine.models[0], info=msgspec.structs.replace(engine.models[0].info, num_experts=8)
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as client:
        answer = await post(client, input_ids=[1, 2, 3], return_routed_experts=True, routed_experts_start_len=start)
    if message:
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
        return
    assert answer.status_code == 200
    assert [item.params.experts_from for item in engine.items] == [start or 0]


@pytest.mark.parametrize("aborted", [False, True])
async def test_samples_know_the_weights_of_their_prompt_s_log_probabilities(
    client: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch, aborted: bool
) -> None:
    """If the prefill was aborted, each sample returns them."""
    play = engine._play

    async def abort_first(reply: Any) -> None:
        if reply.item.params.max_new_tokens:
            await play(reply)
        else:
            reply.add(finish={"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})

    async def return_prompt_first(reply: Any) -> None:
        if not reply.item.params.max_new_tokens:
            reply.results.append({"weights_id": 7})
        await play(reply)

    monkeypatch.setattr(engine, "_play", abort_first if aborted else return_prompt_first)
    body = {"input_ids": [1, 2, 3], "return_logprob": True, "logprob_start_len": 1, "top_logprobs_num": 2}
    answer = await post(client, **body, sampling_params={"n": 2, "max_new_tokens": 5})
    assert answer.status_code == 200
    every, output = LogprobParams(1, 2), LogprobParams(1, 2, prompt_known=7)
    assert requested_logprobs(engine) == [every, *[every if aborted else output] * 2]


# -- bounds ----------------------------------------------------------------------------------

LIMITS = {
    "MAX_LOGPROBS": 99,
    "MAX_STREAMED_LOGPROBS": 49,
    "MAX_HIDDEN": 99,
    "MAX_STREAMED_HIDDEN": 49,
    "MAX_ROUTED": 99,
}


@pytest.fixture
async def small(make_engine: Callable[..., Any], make_app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a server with limits of 99, and 49 in streams; its model has a hidden size of 8, and 4 layers."""
    for name, limit in LIMITS.items():
        monkeypatch.setattr(read_extras, name, limit)
    engine = make_engine()
    info = msgspec.structs.replace(engine.models[0].info, num_experts=8, config={"num_hidden_layers": 4})
    engine.models[0] = msgspec.structs.replace(engine.models[0], info=info)
    app = make_app(engine, enable_return_hidden_states=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("body", "new", "n", "message"),
    [
        ({"return_logprob": True}, 84, 1, ""),
        ({"return_logprob": True, "logprob_start_len": 0}, 26, 3, ""),
        ({"return_logprob": True, "logprob_start_len": 0}, 28, 3, "The request asks for up to 105 log-probabilities"),
        ({"return_logprob": True, "logprob_start_len": 5}, 9, 9, ""),
        ({"return_logprob": True, "top_logprobs_num": 8, "token_ids_logprob": [1, 2]}, 9, 1, ""),
        ({"return_logprob": True, "top_logprobs_num": 8, "token_ids_logprob": [1]}, 10, 1, "at most 99 are returned"),
        ({"return_logprob": True, "stream": True}, 49, 1, ""),
        ({"return_logprob": True, "stream": True}, 50, 1, "or don't stream it"),
        ({"return_hidden_states": True}, 5, 1, ""),
        ({"return_hidden_states": True}, 6, 1, "up to 104 numbers of hidden states; at most 99"),
        ({"return_hidden_states": "last"}, 80, 12, ""),
        ({"return_hidden_states": True, "stream": True}, 1, 1, "'last' asks for one vector."),
        ({"return_routed_experts": True}, 17, 1, ""),
        ({"return_routed_experts": True}, 18, 1, "the experts of up to 100 positions, counted per layer"),
        ({"return_routed_experts": True, "routed_experts_start_len": 6}, 18, 1, ""),
    ],
)
async def test_sizes_are_bounded_over_all_sequences(
    small: httpx.AsyncClient, body: dict[str, Any], new: int, n: int, message: str
) -> None:
    answer = await post(small, **{"input_ids": [1] * 7, "sampling_params": {"max_new_tokens": new, "n": n}} | body)
    if not message:
        assert answer.status_code == 200
        assert "error" not in answer.text[:20]
    else:
        assert message in answer.text
        assert "Lower max_new_tokens or n, or split the request" in answer.text
