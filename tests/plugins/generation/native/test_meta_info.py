"""The entries of meta_info for extra outputs, in SGLang's layout; built step by step or at once."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest

from trunkline.core.server.api import encode_json
from trunkline.plugins.generation.extras import Extras
from trunkline.plugins.generation.native import meta_info
from trunkline.plugins.generation.native.meta_info import ExtraMetaInfo, JsonList, token_text
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable

PROMPT = [10, 11, 12, 13]


def table(chosen: list[float], top: Any = (), top_ids: Any = (), ids: Any = (), sampled: Any = ()) -> LogprobTable:
    def floats(values: Any) -> bytes:
        return np.array(values, "<f4").tobytes()

    def integers(values: Any) -> bytes:
        return np.array(values, "<i4").tobytes()

    return LogprobTable(floats(chosen), integers(top_ids), floats(top), floats(ids), integers(sampled))


def lists(tokenizer: Any = None, **extras: Any) -> ExtraMetaInfo:
    return ExtraMetaInfo(Extras(**extras), PROMPT, 2, tokenizer)


def meta(info: ExtraMetaInfo) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode_json(info.meta()))
    return decoded


def test_a_json_list_is_valid_after_each_extension() -> None:
    json_list, items = JsonList(), []
    for new in ([], [1], [], [[2.5, None], "x,]"], [math.nan, -math.inf]):
        json_list.extend(new)
        items += new
        assert json.loads(encode_json(json_list.as_json())) == json.loads(encode_json(items))


def test_the_prompt_s_first_token_has_no_log_probability() -> None:
    info = lists(logprobs=LogprobParams(1, 2, (7,)))
    info.add(GenerationResult(prompt=table([-1.0], [[-0.5, -1.0]], [[8, 12]], [[-3.0]]), first=2))
    info.add(GenerationResult(prompt=table([-2.0], [[-0.25, -4.0]], [[9, 8]], [[-5.0]]), first=3))
    assert meta(info) == {
        "input_token_logprobs": [[None, 11, None], [-1.0, 12, None], [-2.0, 13, None]],
        "input_top_logprobs": [
            None,
            [[-0.5, 8, None], [-1.0, 12, None]],
            [[-0.25, 9, None], [-4.0, 8, None]],
        ],
        "input_token_ids_logprobs": [None, [[-3.0, 7, None]], [[-5.0, 7, None]]],
        "output_token_logprobs": [],
        "output_top_logprobs": [],
        "output_token_ids_logprobs": [],
    }


@pytest.mark.parametrize(("start", "entries"), [(None, []), (4, []), (3, [[None, 13, None]])])
def test_starts_near_the_end_of_the_prompt(start: int | None, entries: list[Any]) -> None:
    info = lists(logprobs=LogprobParams(start))
    info.add(GenerationResult(output=table([-1.0], sampled=[5])))
    assert meta(info) == {"input_token_logprobs": entries, "output_token_logprobs": [[-1.0, 5, None]]}


def test_log_probabilities_that_are_not_finite_are_null() -> None:
    info = lists(logprobs=LogprobParams(None, 0, (1, 2)))
    info.add(GenerationResult(output=table([math.nan], ids=[[-math.inf, -1.0]], sampled=[5])))
    assert meta(info)["output_token_logprobs"] == [[None, 5, None]]
    assert meta(info)["output_token_ids_logprobs"] == [[[None, 1, None], [-1.0, 2, None]]]


def test_the_text_of_each_token_is_decoded_separately(byte_level: Any) -> None:
    ids = byte_level.encode("🙂 fox", add_special_tokens=False)
    special = byte_level.convert_tokens_to_ids("<|im_end|>")
    info = lists(byte_level, logprobs=LogprobParams(), text=True)
    for token in (*ids, special):
        info.add(GenerationResult(output=table([-1.0], sampled=[token])))
    shown = [text for _, _, text in meta(info)["output_token_logprobs"]]
    assert shown == [byte_level.decode([token]) for token in (*ids, special)]
    assert shown[-1] == "<|im_end|>"
    assert token_text.cache_info().maxsize is not None
    without = lists(byte_level, logprobs=LogprobParams())
    without.add(GenerationResult(output=table([-1.0], sampled=[ids[0]])))
    assert meta(without)["output_token_logprobs"] == [[-1.0, ids[0], None]]


def rows(*values: list[float]) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize("numbers", [1 << 16, 2])
def test_hidden_states_are_a_matrix_and_vectors(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """In any chunks of the prompt. The first rows may be missing because they were cached."""
    monkeypatch.setattr(meta_info, "MAX_ENCODED", numbers)
    info = lists(hidden_states="all")
    assert meta(info) == {"hidden_states": [[]]}
    info.add(GenerationResult(hidden=rows([1, 2]), hidden_at=1))
    info.add(GenerationResult(hidden=rows([3, 4], [5, 6]), hidden_at=2))
    assert meta(info) == {"hidden_states": [[[1, 2], [3, 4], [5, 6]]]}
    info.add(GenerationResult(hidden=rows([7, 8]), hidden_at=4))
    info.add(GenerationResult(hidden=rows([9, 0]), hidden_at=5))
    assert meta(info) == {"hidden_states": [[[1, 2], [3, 4], [5, 6]], [7, 8], [9, 0]]}


def test_the_last_hidden_state_is_one_vector() -> None:
    info = lists(hidden_states="last")
    assert meta(info) == {}
    info.add(GenerationResult(hidden=rows([7, 8]), hidden_at=4))
    assert meta(info) == {"hidden_states": [7, 8]}


def test_routed_experts_are_joined_at_the_end() -> None:
    info = lists(experts_from=0)
    info.add(GenerationResult(experts=b"abcd"))
    info.add(GenerationResult(experts=b"e"))
    assert meta(info) == {}
    info.finish()
    assert base64.b64decode(meta(info)["routed_experts"]) == b"abcde"


def test_only_the_prompt_is_taken_from_results_of_another_request() -> None:
    info = lists(logprobs=LogprobParams(2))
    info.add_prompt(GenerationResult(prompt=table([-1.0]), first=3, output=table([-9.0], sampled=[9])))
    assert meta(info) == {
        "input_token_logprobs": [[None, 12, None], [-1.0, 13, None]],
        "output_token_logprobs": [],
    }
