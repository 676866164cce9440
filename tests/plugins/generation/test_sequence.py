"""The weight versions in the meta_info of a sequence, and where its text is in its tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.types import Submission
from trunkline.plugins.generation.sampling.params import parse_sampling_params
from trunkline.plugins.generation.sequence import OutputSequence


@pytest.mark.parametrize(
    ("former", "label", "tokens", "spans", "shown"),
    [
        ([], "two", 3, None, "two"),
        ([("one", 2)], "two", 3, [("one", 0, 2), ("two", 2, 3)], "two"),
        ([("one", 2), ("two", 3)], "one", 5, [("one", 0, 2), ("two", 2, 3), ("one", 3, 5)], "one"),
        ([("one", 3)], "two", 3, [("one", 0, 3)], "one"),  # it ended before a token was generated with the new weights
    ],
)
async def test_spans_of_weights(
    make_engine: Callable[..., Any],
    former: list[tuple[str, int]],
    label: str,
    tokens: int,
    spans: list[tuple[str, int, int]] | None,
    shown: str,
) -> None:
    engine = make_engine()
    (reply,) = engine.submit("fake", "generation", [Submission(prompt=[1], params=parse_sampling_params({}), rid="x")])
    reply.weight_version, reply.versions, reply.tokens = label, former, [5] * tokens
    meta = OutputSequence(reply, [1], parse_sampling_params({}), engine.models[0], None).meta_info()
    assert meta["weight_version"] == shown
    named = meta.get("weight_versions")
    assert (named and [(span["version"], span["start"], span["end"]) for span in named]) == spans


def make_sequence(tokenizer: Any, tokens: list[int]) -> OutputSequence:
    reply: Any = SimpleNamespace(error=None, finish={"type": "stop"}, tokens=tokens)
    served: Any = SimpleNamespace(info=SimpleNamespace(eos_token_ids=()))
    sequence = OutputSequence(reply, [], parse_sampling_params({}), served, tokenizer)
    sequence.refresh()
    return sequence


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_tokens_before_a_position(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    unit = tokenizer.encode("<think>Hé 🙂.</think> quick brown<|im_end|> fox", add_special_tokens=False)
    tokens = (unit * 20)[:-1]
    sequence = make_sequence(tokenizer, tokens)
    assert sequence.text
    beginnings = [make_sequence(tokenizer, tokens[:count]).text or "" for count in range(len(tokens) + 1)]
    lengths = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in beginnings]
    everywhere = list(range(len(sequence.text) + 2))
    expected = [
        next((n for n, length in enumerate(lengths) if length >= position), len(tokens)) for position in everywhere
    ]
    assert sequence.count_tokens(everywhere) == expected
    for positions in ([], [0], [1, 1], everywhere[-3:], everywhere[70:72], everywhere[::97]):
        assert sequence.count_tokens(positions) == [expected[position] for position in positions]


def test_a_text_is_decoded_once_to_count_tokens(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = byte_level.encode("<think>a</think>b", add_special_tokens=False) * 200
    sequence = make_sequence(byte_level, tokens)
    decoded = 0
    decode = type(byte_level).decode

    def counting(self: Any, ids: list[int], **options: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(decode(self, ids, **options))

    monkeypatch.setattr(type(byte_level), "decode", counting)
    sequence.count_tokens(range(len(sequence.text or "")))
    assert decoded < 20 * len(tokens)
