"""Hostile grammars: each is refused or compiled. Those that would crash or block the engine end a worker process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from transformers import PreTrainedTokenizerFast

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.grammar import trial
from trunkline.plugins.generation.grammar.llguidance_engine import LlguidanceEngine
from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary
from trunkline.plugins.generation.grammar.trial import TrialProcess, Trials
from trunkline.plugins.generation.schemas import Grammar


@pytest.fixture(scope="module")
def vocabulary(byte_level: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary(byte_level.backend_tokenizer.to_str(), len(byte_level), (byte_level.eos_token_id,))


@pytest.fixture(scope="module")
def trials(vocabulary: Vocabulary) -> Iterator[Trials]:
    trials = Trials(vocabulary)
    yield trials
    while not trials._idle.empty():
        trials._idle.get().close()


def chain(count: int) -> dict[str, Any]:
    references = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**references, f"a{count}": {"type": "string"}}}


def doubling(count: int) -> dict[str, Any]:
    references = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**references, f"a{count}": {}}}


def any_name(prefix: str) -> dict[str, Any]:
    return {"anyOf": [{"properties": {f"{prefix}{j}": {}}} for j in range(4)]}


def one_of(depth: int) -> dict[str, Any]:
    if not depth:
        return {"type": "string"}
    names = (f"p{depth}{i}" for i in range(2))
    options = [{"type": "object", "properties": {name: one_of(depth - 1)}, "required": [name]} for name in names]
    return {"anyOf": options}


NESTED = '{"properties":{"a":' * 3000 + "{}" + "}}" * 3000


SCHEMAS: dict[str, tuple[Any, str | None]] = {
    "chain of references": (chain(3000), "it is too deeply nested, or needs too much memory"),
    "reference to itself": ({"$ref": "#"}, "no text matches it"),
    "circle": ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}}, ""),
    "doubling references": (doubling(25), None),
    "anyOf in anyOf": (one_of(9), None),
    "product of anyOf": ({"allOf": [any_name(f"k{i}") for i in range(10)]}, "schema too large"),
    "patterns of allOf": ({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]}, ""),
    "long": ({"type": "string", "maxLength": 10**9}, None),
    "long minimum": ({"type": "string", "minLength": 4 * 10**9}, None),
    "many items": ({"type": "array", "minItems": 4 * 10**9}, None),
    "500 names": ({"properties": {f"p{i}": {"type": "string", "maxLength": 200} for i in range(500)}}, None),
    "required names": ({"required": [f"p{i}" for i in range(2000)]}, None),
    "multiples": ({"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]}, "fuel exhausted"),
    "tiny multiple": ({"type": "number", "multipleOf": 1e-300}, "too many digits"),
    "huge range": ({"type": "integer", "minimum": -1e308, "maximum": 1e308}, ""),
    "overlapping names": ({"patternProperties": {f"^p{i}.*x": {} for i in range(100)}}, "not disjoint"),
    "pattern": ({"type": "string", "pattern": "a?" * 4000}, None),
    "formats": ({"type": "string", "allOf": [{"format": f} for f in ("email", "uri", "ipv6")]}, "Regex is empty"),
}  # fmt: skip
REGEXES: dict[str, str | None] = {
    "(" * 4000 + "a" + ")" * 4000: "",
    "a?" * 4000: None,
    "(a{1,100}){1,100}": None,
    "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}": None,
    "(.*a.*){20}": None,
    "(?:" * 100 + "a" + "{2})" * 100: None,
    "|".join(f"a{i}" for i in range(1500)): None,
    "[a-z]{1,50000}": None,
    r"\p{L}{1,1000}": None,
    r"(a)\1": "backreferences are not supported",
    "(?=a)b": "look-around",
    "a" * 8193: "it may have at most 8192 characters, got 8193",
    "(?s:.*)a(?s:.{14})": None,
    "[": "",
}
EBNF: dict[str, str | None] = {
    "root ::= root root | root root root | \"a\"": None,
    "root ::= root": "",
    "root ::= a*\na ::= b*\nb ::= \"\"": None,
    "root ::= " + " | ".join(f'"a{i}"' for i in range(4000)): None,
    "root ::= " + " ".join('"a"' for _ in range(8000)): None,
    "root ::= " + "(" * 30 + '"a"' + "){1,1000}" * 30: "line 1: more than 20 nested parentheses",
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60 ::= "x"': "",
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(990)) + 'r990 ::= "x"': None,
    'root ::= ("a" | "b"){100000}': None,
}  # fmt: skip


def case(kind: Literal["json_schema", "regex", "ebnf"], text: str, problem: str | None, name: str) -> Any:
    return pytest.param(Grammar(kind, text), problem, id=name)


CASES = [
    case("json_schema", NESTED, "it is not valid JSON: maximum recursion depth", "nested objects"),
    *(case("json_schema", json.dumps(schema), problem, name) for name, (schema, problem) in SCHEMAS.items()),
    *(case("regex", text, problem, f"regex {index}") for index, (text, problem) in enumerate(REGEXES.items())),
    *(case("ebnf", text, problem, f"ebnf {index}") for index, (text, problem) in enumerate(EBNF.items())),
]


@pytest.mark.parametrize(("grammar", "problem"), CASES)
def test_each_is_refused_or_compiled(grammar: Grammar, problem: str | None, trials: Trials) -> None:
    """``problem``: "" is any reason. What compiles here at the limit may also be refused on another machine."""
    assert len(grammar.text) < 1 << 17
    if problem is None:
        assert trials.try_out(grammar)
    else:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            trials.try_out(grammar)
        assert problem in str(caught.value)


def test_a_crash_does_no_harm_to_the_worker(vocabulary: Vocabulary) -> None:
    trials = Trials(vocabulary)
    assert trials.try_out(Grammar("regex", "a"))
    first = trials._idle.get()
    trials._idle.put(first)
    with pytest.raises(ValueError, match="too deeply nested"):
        trials.try_out(Grammar("json_schema", json.dumps(chain(3000))))
    assert trials.try_out(Grammar("regex", "b"))
    assert trials._idle.get() is first
    first.close()


def test_too_much_cpu_time_is_an_answer_of_its_own(trials: Trials) -> None:
    hostile = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{count}}}$"} for count in range(10, 30)]}
    assert trials.try_out(Grammar("json_schema", json.dumps(hostile)), 0.05) is None
    assert trials.try_out(Grammar("regex", "a"), 0.5)


@pytest.mark.parametrize("ended_by", ["SIGALRM", "SIGKILL"])
def test_the_load_of_the_machine_is_no_fault_of_the_grammar(
    ended_by: str, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little of a core, or of memory: the signals come to the compiling process as if from a loaded system."""
    action = "time.sleep(60)" if ended_by == "SIGALRM" else "os.kill(os.getpid(), 9)"
    command = (
        "import os, time; from trunkline.plugins.generation.grammar import worker; "
        f"worker.WAIT_SECONDS = 0.0; worker.answer_of = lambda *_: {action}; worker.main()"
    )
    monkeypatch.setattr(trial, "COMMAND", (trial.COMMAND[0], "-c", command))
    trials = Trials(vocabulary)
    with pytest.raises(RequestError, match=f"to compile this regex grammar now: .* by {ended_by}. Try") as caught:
        trials.try_out(Grammar("regex", "a"), 0.01)
    assert caught.value.status == 503
    trials._idle.get().close()


def test_the_memory_of_a_grammar_is_measured(trials: Trials) -> None:
    """Also after another one of the same size, whose memory was freed."""

    def size(schema: Any) -> int:
        answer = trials.try_out(Grammar("json_schema", json.dumps(schema)))
        assert answer is not None
        return answer.nbytes

    first, second = (size({"type": "integer", "multipleOf": number}) for number in (4999, 4993))
    assert first > 1 << 20
    assert 0.7 < second / first < 1.4
    assert size({"type": "object", "properties": {"a": {}}}) < 1 << 20


def test_another_thread_can_end_a_trial(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (
        "from trunkline.plugins.generation.grammar import worker; "
        "worker.try_in_child = lambda *_: __import__('time').sleep(60); worker.main()"
    )
    monkeypatch.setattr(trial, "COMMAND", (trial.COMMAND[0], "-c", command))
    trials = Trials(vocabulary)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(trials.try_out, Grammar("regex", "a"))
        while not trials._busy:
            time.sleep(0.01)
        trials.cancel()
        assert isinstance(running.exception(20), RuntimeError)


def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "COMMAND", (trial.COMMAND[0], "-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="didn't start"):
        TrialProcess(vocabulary)


def test_a_tokenizer_that_is_not_supported_is_the_reason(byte_level: PreTrainedTokenizerFast) -> None:
    from tokenizers import Tokenizer, decoders, models

    pieces = Tokenizer(models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    for tokenizer, end_ids, reason in (
        (PreTrainedTokenizerFast(tokenizer_object=pieces), {0}, "llguidance doesn't support this model's tokenizer"),
        (byte_level, set(), "this model has no end token"),
        (object(), {0}, "llguidance supports only tokenizers with a tokenizer.json"),
    ):
        engine = LlguidanceEngine(tokenizer, 2, end_ids)  # type: ignore[arg-type]
        engine.warm_up()
        with pytest.raises(ValueError, match=reason):
            engine.compile(Grammar("regex", "a"))
