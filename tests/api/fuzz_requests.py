"""Random requests to ``/generate``, and what any reply to one must look like; used by test_fuzz_sampling.py.

Three kinds: correct ones, with borderline values, which must be answered; ones with exactly one wrong value, which must
be refused; and ones with junk anywhere, for which both is fine as long as the status is below 500.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Draw = Callable[[random.Random], Any]
LONGEST = 96  # tokens of a prompt; some are nearly as long as the context
TEXTS = (
    "a", "the sea", " ", "\n\n", "1, 2, 3,", "naïve café", "日本語の文", "🙂🙃", "e\u0301", "\u200b", "\x00", "<s>",
    "</s>", "a" * 300, "The quick brown fox jumps over the lazy dog. " * 3,
)  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", "x", "null", "1", "\x00", "a" * 5000, [], {}, [[]], [None], {"": None}, [1, "x"], {"x": [1]},
    [0] * 2000, json.loads("[" * 60 + "]" * 60), "\ud800",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """What the requests have to know of the model that is served."""

    vocabulary: int
    context: int  # tokens
    hidden: int
    end: int  # id of the end token


@dataclass(slots=True)
class Case:
    """One request. ``content`` is its body as bytes; ``leave``: the client hangs up after so many seconds."""

    body: dict[str, Any]
    verdict: Literal["answered", "refused", "either"]
    what: str
    content: bytes = b""
    leave: float | None = None
    may_abort: bool = False  # somebody ends it from outside

    def __post_init__(self) -> None:
        self.content = self.content or json.dumps(self.body).encode()


@dataclass(slots=True)
class Answer:
    """``value`` is the decoded body, or the list of a stream's frames without ``[DONE]``, which ``done`` stands for."""

    status: int
    value: Any
    streamed: bool = False
    done: bool = False


def one_of(*values: Any) -> Draw:
    return lambda chance: copy.deepcopy(chance.choice(values))


def flag(chance: random.Random) -> bool:
    return chance.random() < 0.5


def parameters(model: Model) -> dict[str, tuple[Draw, tuple[Any, ...]]]:
    """Of each sampling parameter: correct values, and wrong ones. What depends on others is not here."""
    top = model.vocabulary - 1
    penalty = one_of(None, 0, -2, 2, 2.0, 0.5, -0.001), (2.001, -2.001, "0.5", True, [0.5])
    biases = one_of(
        None, {}, {"5": 2.5}, {"7": -100, str(top): 1e9}, {"0": -1e9}, {str(i): i % 7 - 3 for i in range(500)}
    )
    return {
        "temperature": (one_of(None, 0, 0.0, 1e-7, 0.3, 1, 1.7, 100, 1e30, 1e308), (-0.1, "hot", True, [1], {})),
        "top_p": (one_of(None, 1, 1.0, 0.5, 0.01, 1e-9), (0, 1.01, -1, "x")),
        "top_k": (one_of(None, -1, 1, 2, 5.0, model.vocabulary, 2**31, 2**62), (0, -2, 1.5, "x", 2**63)),
        "min_p": (one_of(None, 0, 0.1, 1), (-0.1, 1.1, "x")),
        "frequency_penalty": penalty,
        "presence_penalty": penalty,
        "repetition_penalty": (one_of(None, 1, 0.5, 2, 1e-30, 1.2), (0, 2.001, -1, "x")),
        "stop": (
            one_of(None, "", [], "e", ["the", "\n"], "</s>", ["x" * 256], [f"stop {i}" for i in range(32)], "é"),
            (5, [1], ["x"] * 33, "x" * 257, {}, [None]),
        ),
        "stop_token_ids": (
            one_of(None, [], [model.end], [3, None, 5], list(range(40)), list(range(model.vocabulary))),
            ("a", 5, [1.5], [0] * 1025, ["x"]),
        ),
        "stop_regex": (
            one_of(None, "", [], "[aeiou]", ["[0-9]{3}", "x+y?"], "(a|a)*b", "x*", "\\pL+7", ["a"] * 32),
            ("(", "a" * 257, ["a"] * 33, 5, [None], r"(?=a)", r"(a)\1", r"\pL{500}", "((a{100}){100}){100}"),
        ),
        "ignore_eos": (one_of(None, True, False), ("yes", 2, [])),
        "skip_special_tokens": (one_of(None, True, False), ("no", {})),
        "spaces_between_special_tokens": (one_of(None, True, False), ("no", 7)),
        "no_stop_trim": (one_of(None, True, False), ("no", 2)),
        "logit_bias": (
            biases,
            ({str(top + 1): 1}, {"-1": 1}, {"x": 1}, {"5": "a"}, {"5": None}, [1], 5, {"5": 1e300}),
        ),
        "sampling_seed": (one_of(None, 0, -1, 1, 2**63 - 1, -(2**63)), (2**63, "1", 1.5, True)),
        "stream_interval": (one_of(None, 1, 3, 1000), (0, -1, "x", 1.5)),
        "custom_params": (one_of(None, {}), ({"a": 1}, 5)),
        "beam_width": (one_of(None, 1), (0, "x")),
        "watermark": (one_of(None), ()),
    }


class Generator:
    """``next()`` is the next case; the same seed gives the same cases, apart from their request ids' ``prefix``."""

    def __init__(self, seed: int, model: Model, prefix: str = "fuzz") -> None:
        self.chance = random.Random(seed)
        self.model = model
        self.parameters = parameters(model)
        self.prefix = prefix
        self.count = 0

    def next(self) -> Case:
        self.count += 1
        share = self.chance.random()
        if share < 0.6:
            return self._with_manners(Case(self.correct(), "answered", "correct"))
        if share < 0.8:
            body, what = self.wrong()
            return Case(body, "refused", what)
        return self._with_manners(self.hostile())

    def _with_manners(self, case: Case) -> Case:
        """Some clients hang up, and some requests are ended by another client."""
        share = self.chance.random()
        if share < 0.08:
            case.leave = self.chance.choice((0.0, 0.01, 0.05, 0.2))
        elif share < 0.2 and case.verdict == "answered" and isinstance(case.body.get("rid"), str):
            case.may_abort = True
        return case

    def correct(self) -> dict[str, Any]:
        """A body with which nothing is wrong."""
        chance = self.chance
        body = self._prompts()
        count, single = shape(body)
        n = chance.choice((1, 1, 1, 1, 2, 3))
        if chance.random() < 0.9:
            body["sampling_params"] = self._sampling(n)
            if not single and chance.random() < 0.3:
                body["sampling_params"] = [self._sampling(n) for _ in range(count)]
        n = samples(body)
        if chance.random() < 0.4:
            body["stream"] = True
        if chance.random() < 0.35:
            self._logprobs(body, count, single or n > 1)
        if chance.random() < 0.4:
            body["rid"] = f"{self.prefix}-{self.count}."  # with an end: an abort hits every id that it begins
            if not single and n == 1 and flag(chance):
                body["rid"] = [f"{body['rid']}{index}" for index in range(count)]
        optional: tuple[tuple[str, Draw], ...] = (
            ("priority", one_of(None, 0, 5, -(2**63))),
            ("cache_salt", one_of(None, "", "one", "two 🙂")),
            ("extra_key", one_of(None, "key")),
            ("return_hidden_states", one_of(None, False, True, "last")),
            ("return_prompt_token_ids", one_of(None, False, True)),
            ("lora_path", one_of(None, *([] if single else [[None] * count]))),
            ("custom_logit_processor", one_of(None)),
            ("return_routed_experts", one_of(None, False)),
            ("log_metrics", one_of(True)),
            ("a_field_of_the_future", one_of(1, {})),
        )
        for name, draw in optional:
            if chance.random() < 0.08:
                body[name] = draw(chance)
        return body

    def _prompts(self) -> dict[str, Any]:
        chance = self.chance
        kind = chance.random()
        if kind < 0.2:
            return {"text": chance.choice(TEXTS)}
        if kind < 0.35:
            return {"text": [chance.choice(TEXTS) for _ in range(chance.randint(1, 5))]}
        if kind < 0.4:
            width, length = self.model.hidden, chance.randint(1, 4)
            return {"input_embeds": [[round(chance.gauss(0, 1), 3) for _ in range(width)] for _ in range(length)]}
        if kind < 0.7:
            return {"input_ids": self._ids()}
        return {"input_ids": [self._ids() for _ in range(chance.randint(1, 6))]}

    def _ids(self) -> list[int]:
        """Half of the prompts share their beginning with others."""
        chance = self.chance
        length = chance.choice((1, 2, 7, 33, LONGEST, chance.randint(1, LONGEST)))
        if chance.random() < 0.02:
            length = self.model.context - 80
        if flag(chance):
            base = chance.randrange(4)
            return [3 + (base * 31 + 7 * index) % (self.model.vocabulary - 3) for index in range(length)]
        return [chance.randrange(self.model.vocabulary) for _ in range(length)]

    def _sampling(self, n: int) -> dict[str, Any]:
        chance = self.chance
        share = chance.choice((0.0, 0.1, 0.3, 0.6))
        found = {name: draw(chance) for name, (draw, _) in self.parameters.items() if chance.random() < share}
        found["max_new_tokens"] = most = chance.choice((0, 1, 2, 5, 16, 16.0, 40))
        if chance.random() < 0.01:
            found["max_new_tokens"] = most = None
        if chance.random() < 0.15:
            found["min_new_tokens"] = chance.choice((None, 0, 1, int(8 if most is None else most)))
            if found["min_new_tokens"] and most is not None:
                found["min_new_tokens"] = min(found["min_new_tokens"], int(most))
        if n > 1 or chance.random() < 0.1:
            found["n"] = n
        return found

    def _logprobs(self, body: dict[str, Any], count: int, scalar: bool) -> None:
        """The fields of log-probabilities: one value for all prompts, or a list with one for each."""
        chance, model = self.chance, self.model

        def each(draw: Draw) -> Any:
            return draw(chance) if scalar or flag(chance) else [draw(chance) for _ in range(count)]

        body["return_logprob"] = each(one_of(True, True, False))
        starts = one_of(-1, None) if "input_embeds" in body else one_of(-1, None, 0, 0, 1)
        if chance.random() < 0.7:
            body["logprob_start_len"] = each(starts)
        if chance.random() < 0.5:
            body["top_logprobs_num"] = each(one_of(0, None, 1, 5, 50))
        if chance.random() < 0.3:
            body["token_ids_logprob"] = each(one_of(None, [], [3, 5], [0, model.vocabulary - 1], [7, 7]))
        if chance.random() < 0.4:
            body["return_text_in_logprobs"] = flag(chance)

    def wrong(self) -> tuple[dict[str, Any], str]:
        """A body with exactly one thing wrong with it, and what that is."""
        chance, model = self.chance, self.model
        body = self.correct()
        count, single = shape(body)
        if flag(chance):
            name, (_, values) = chance.choice([item for item in self.parameters.items() if item[1][1]])
            sampling = body.setdefault("sampling_params", {})
            one = chance.choice(sampling) if isinstance(sampling, list) else sampling
            one[name] = value = copy.deepcopy(chance.choice(values))
            return body, f"{name} = {str(value)[:60]}"
        changes: list[tuple[str, dict[str, Any]]] = [
            ("token id beyond the vocabulary", {"text": None, "input_embeds": None, "input_ids": [model.vocabulary]}),
            ("negative token id", {"text": None, "input_embeds": None, "input_ids": [[3], [-1]]}),
            ("no tokens", {"text": None, "input_embeds": None, "input_ids": []}),
            ("empty text", {"input_ids": None, "input_embeds": None, "text": ""}),
            ("text is a number", {"input_ids": None, "input_embeds": None, "text": 5}),
            ("no prompt", {"input_ids": None, "input_embeds": None, "text": None}),
            ("embedding too narrow", {"input_ids": None, "text": None, "input_embeds": [[0.5]]}),
            ("embedding too large", {"input_ids": None, "text": None, "input_embeds": [[3.4e38] * model.hidden] * 2}),
            ("too long", {"text": None, "input_embeds": None, "input_ids": [3] * (model.context + 1)}),
            ("an adapter", {"lora_path": "nosuch"}),
            ("a processor", {"custom_logit_processor": "gASVx"}),
            ("a session that isn't open", {"session_params": {"id": "nosuch"}}),
            ("an unknown sampling parameter", {"sampling_params": {"temperatur": 1}}),
            ("parameters are a text", {"sampling_params": "none"}),
            ("hidden states of the first", {"return_hidden_states": "first"}),
            ("priority beyond 64 bits", {"priority": 2**63}),
            ("stream is a word", {"stream": "perhaps"}),
            ("start before the beginning", {"return_logprob": True, "logprob_start_len": -2}),
            ("start behind the end", {"return_logprob": True, "logprob_start_len": model.context}),
            ("too many top ids", {"return_logprob": True, "top_logprobs_num": 100_000}),
            ("negative top ids", {"return_logprob": True, "top_logprobs_num": -1}),
            ("logprob of no token", {"return_logprob": True, "token_ids_logprob": [model.vocabulary]}),
            ("experts of a dense model", {"return_routed_experts": True}),
            ("too many samples", {"sampling_params": {"n": 100_000}}),
            ("more new tokens than fit", {"sampling_params": {"max_new_tokens": model.context}}),
            ("minimum above the maximum", {"sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}}),
        ]
        if not single:
            changes += [
                ("a parameter object too many", {"sampling_params": [{}] * (count + 1)}),
                ("different n", {"sampling_params": [{"n": index + 1} for index in range(count)]}),
                ("an id too many", {"rid": [f"{self.prefix}-w{self.count}-{index}" for index in range(count + 1)]}),
            ]
        what, change = chance.choice(changes)
        if what == "different n" and count == 1:
            what, change = "no prompt", {"input_ids": None, "input_embeds": None, "text": None}
        if "input_ids" in change:  # another number of prompts: nothing else may have one value for each
            body = {"stream": bool(body.get("stream"))}
        return body | change, what

    def hostile(self) -> Case:
        """A correct body with junk in random places, or bytes that are no JSON any more."""
        chance = self.chance
        body = self.correct()
        for _ in range(chance.choice((1, 1, 2, 5))):
            _spoil(chance, body)
        content = json.dumps(body).encode()
        if chance.random() < 0.15:
            cut = chance.randrange(len(content))
            content = content[:cut] + chance.choice((b"", b"\xff", b"\x00", b"}", b'"', b"[[[[")) + content[cut + 1 :]
        return Case(body, "either", "junk", content)


def _spoil(chance: random.Random, body: dict[str, Any]) -> None:
    """Put junk in the place of a random value, at any depth."""
    place: Any = body
    while True:
        keys: Sequence[Any] = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = chance.choice(keys)
        below = place[key]
        if isinstance(below, dict | list) and below and chance.random() < 0.7:
            place = below
            continue
        place[key] = copy.deepcopy(chance.choice(JUNK))
        return


def shape(body: dict[str, Any]) -> tuple[int, bool]:
    """How many prompts a correct body has, and whether it is one alone, not a list."""
    for name, alone in (("input_ids", int), ("text", str), ("input_embeds", list)):
        given = body.get(name)
        if given is None:
            continue
        if name == "text":
            return (1, True) if isinstance(given, alone) else (len(given), False)
        if name == "input_embeds":
            return 1, True  # only single ones are made
        return (1, True) if isinstance(given[0], alone) else (len(given), False)
    raise AssertionError(body)


def samples(body: dict[str, Any]) -> int:
    given = body.get("sampling_params") or {}
    return int((given[0] if isinstance(given, list) else given).get("n") or 1)


@dataclass(slots=True)
class _Expected:
    """What is known of one record of a correct request."""

    body: dict[str, Any]
    sampling: dict[str, Any]
    ids: list[int] | None  # of the prompt; None for texts and embeddings
    logprobs: dict[str, Any] = field(default_factory=dict)


def _expected(body: dict[str, Any]) -> list[_Expected]:
    """By record, prompt by prompt, its samples one after the other."""
    count, single = shape(body)
    n = samples(body)
    found = []
    for index in range(count):
        sampling = body.get("sampling_params") or {}
        if isinstance(sampling, list):
            sampling = sampling[index]
        given = body.get("input_ids")
        ids = given if given is None or single else given[index]
        logprobs = {}
        for name in ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"):
            value = body.get(name)
            nested = isinstance(value, list) and (name != "token_ids_logprob" or any(map(_is_list, value)))
            logprobs[name] = value[index] if nested and not single else value
        found += [_Expected(body, sampling, ids, logprobs)] * n
    return found


def _is_list(value: Any) -> bool:
    return value is None or isinstance(value, list)


def check(case: Case, answer: Answer, model: Model) -> None:
    """AssertionError with what is wrong with the answer."""
    assert answer.status < 500, f"{answer.status}: {answer.value}"
    refused = answer.status >= 400
    if answer.streamed:
        assert answer.done, f"the stream ended without [DONE]: {answer.value[-1:]}"
        assert all(isinstance(frame, dict) for frame in answer.value), answer.value
        errors = [frame["error"] for frame in answer.value if "error" in frame]
        assert all(error.get("code", 400) < 500 for error in errors), errors
        refused = bool(errors)
    # What only the engine refuses (custom_params, embeddings that overflow) may have been ended before.
    either = case.verdict == "either" or (case.verdict == "refused" and case.may_abort)
    assert either or refused == (case.verdict == "refused"), f"{answer.status}: {answer.value}"[:2000]
    if refused:
        return
    records = _final(answer.value, model) if answer.streamed else answer.value
    for record in records if isinstance(records, list) else [records]:
        _check_record(record, model, may_abort=case.may_abort)
    if case.verdict == "answered":
        expected = _expected(case.body)
        _, single = shape(case.body)
        alone = single and samples(case.body) == 1
        if not answer.streamed:
            assert isinstance(records, dict) == alone, "a list for a list, an object for one prompt and sample"
        elif not alone:
            assert all("index" in frame for frame in answer.value)
        records = [records] if isinstance(records, dict) else records
        assert len(records) == len(expected)
        for record, one in zip(records, expected, strict=True):
            _check_wanted(record, one, model)


def _final(frames: list[dict[str, Any]], model: Model) -> list[dict[str, Any]]:
    """The last record of each sequence of a stream; what was shown before is its beginning."""
    last: dict[int, dict[str, Any]] = {}
    for frame in frames:
        before = last.get(index := frame.get("index", 0))
        if before is not None:
            assert before["meta_info"]["finish_reason"] is None, "a frame after the last one"
            assert frame["text"].startswith(before["text"]), (before["text"], frame["text"])
            assert frame["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            for name, value in before["meta_info"].items():
                if name.endswith(("token_logprobs", "top_logprobs", "ids_logprobs")):
                    assert frame["meta_info"][name][: len(value)] == value, name
        last[index] = frame
    assert sorted(last) == list(range(len(last)))
    return [last[index] for index in range(len(last))]


def _check_record(record: dict[str, Any], model: Model, *, may_abort: bool) -> None:
    meta, ids = record["meta_info"], record["output_ids"]
    assert isinstance(record["text"], str)
    assert all(0 <= token < model.vocabulary for token in ids)
    assert meta["completion_tokens"] == len(ids)
    assert 0 < meta["prompt_tokens"] + len(ids) <= model.context
    assert 0 <= meta["cached_tokens"] < meta["prompt_tokens"]
    finish = meta["finish_reason"]
    assert finish["type"] in (("length", "stop", "abort") if may_abort else ("length", "stop")), finish
    assert (finish.get("status_code") or 0) < 500, finish


def _check_wanted(record: dict[str, Any], expected: _Expected, model: Model) -> None:
    """What a correct request can count on."""
    meta, ids, finish = record["meta_info"], record["output_ids"], record["meta_info"]["finish_reason"]
    sampling = {name: value for name, value in expected.sampling.items() if value is not None}
    if expected.ids is not None:
        assert meta["prompt_tokens"] == len(expected.ids)
        asked = bool(expected.body.get("return_prompt_token_ids"))
        assert record.get("prompt_token_ids") == (expected.ids if asked else None)
    if finish["type"] == "abort":
        return
    room = model.context - meta["prompt_tokens"]
    most = min(room, int(sampling.get("max_new_tokens", 128)))
    if "max_new_tokens" in expected.sampling and expected.sampling["max_new_tokens"] is None:
        most = room
    assert len(ids) <= most
    stops = _listed(sampling.get("stop")) + _listed(sampling.get("stop_regex"))
    if finish["type"] == "length":
        assert len(ids) == most or finish["length"] == len(ids)
    elif isinstance(finish["matched"], str):
        assert finish["matched"] in stops
    else:
        assert not sampling.get("ignore_eos")
        assert finish["matched"] == ids[-1]
        assert ids[-1] in (model.end, *(sampling.get("stop_token_ids") or ()))
    if not isinstance(finish.get("matched"), str) and len(sampling.get("stop_token_ids", ())) < model.vocabulary:
        assert len(ids) >= min(most, int(sampling.get("min_new_tokens", 0)))
    if expected.logprobs["return_logprob"]:
        _check_logprobs(meta, ids, expected, model)
    else:
        assert "output_token_logprobs" not in meta


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _check_logprobs(meta: dict[str, Any], ids: list[int], expected: _Expected, model: Model) -> None:
    start, top, asked = (
        expected.logprobs[name] for name in ("logprob_start_len", "top_logprobs_num", "token_ids_logprob")
    )
    start = -1 if start is None else start
    rows = {"output": max(1, len(ids)), "input": meta["prompt_tokens"] - start if start >= 0 else 0}
    if len(ids) == 0:
        assert expected.sampling["max_new_tokens"] == 0
    else:
        assert [entry[1] for entry in meta["output_token_logprobs"]] == ids
    texts = expected.body.get("return_text_in_logprobs")
    for side, count in rows.items():
        entries = meta[f"{side}_token_logprobs"]
        assert len(entries) == count, (side, len(entries), count)
        assert [index for index, entry in enumerate(entries) if entry[0] is None and side == "input"] in ([], [0])
        for value, token, text in entries:
            assert value is None or value <= 1e-5
            assert 0 <= token < model.vocabulary
            assert isinstance(text, str) if texts else text is None
        for name, wanted in (("top", top or 0), ("token_ids", len(asked or ()))):
            key = f"{side}_{name}_logprobs"
            assert (key in meta) == bool(wanted), key
            if wanted:
                assert len(meta[key]) == count, key
                assert all(one is None or len(one) == wanted for one in meta[key]), key
    if expected.ids is not None and start >= 0:
        assert [entry[1] for entry in meta["input_token_logprobs"]] == expected.ids[start:]
