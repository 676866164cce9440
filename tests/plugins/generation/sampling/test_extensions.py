"""Plugins' logits processors and stop conditions: their arguments, and the effects of their failures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trunkline.core.errors import PluginError, RequestError
from trunkline.core.types import MAX_FAILURES
from trunkline.plugins.generation.sampling import extensions
from trunkline.plugins.generation.sampling.extensions import FAILED_MESSAGE

VOCABULARY = 322
ORIGIN = "plugin 'strange' (strange-things 1.2)"


class Only:
    """Allows one token only: the requested one, and the next id at each further token."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[int]]] = []

    def admit(self, request: Any) -> Any:
        return (request.params.custom_params or {}).get("only")

    def apply(self, state: int, logits: torch.Tensor, tokens: Any) -> None:
        assert (logits.shape, logits.dtype) == ((VOCABULARY,), torch.float32)
        self.calls.append((state, list(tokens)))
        keep = state + len(tokens)
        logits[:keep] = -torch.inf
        logits[keep + 1 :] = -torch.inf


class Faulty:
    """Runs the action that a request's custom_params name, in the method ``where``."""

    def __init__(self, where: str) -> None:
        self.where = where

    def admit(self, request: Any) -> Any:
        do = (request.params.custom_params or {}).get("do")
        if self.where == "admit" and do is not None:
            ACTIONS[do](None)
        return do

    def apply(self, state: str, logits: torch.Tensor, tokens: Any) -> None:
        ACTIONS[state](logits)

    def check(self, state: str, token: int, text: str) -> Any:
        return ACTIONS[state](None)


def exit_(logits: Any) -> None:
    raise SystemExit(3)


def answer(logits: Any) -> None:
    raise RequestError("not with me", status=422, param="custom_params")


def odd(logits: Any) -> None:
    raise RequestError("\ud800", status=200)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "good": lambda logits: None,
    "raise": lambda logits: [][0],
    "exit": exit_,
    "answer": answer,
    "odd": odd,
    "nan": lambda logits: logits.fill_(torch.nan),
    "nothing": lambda logits: logits.fill_(-torch.inf),
    "number": lambda logits: 5,
    "long": lambda logits: "x" * 1025,
    "surrogate": lambda logits: "\ud800",
}


def flat() -> torch.Tensor:
    return torch.zeros(VOCABULARY)


def test_a_processor_changes_its_own_rows_only(make_driver: Callable[..., Any]) -> None:
    only = Only()
    driver = make_driver(processors=[only])
    mine, other = driver.admit(key=1, custom_params={"only": 7}), driver.admit(key=2, custom_params={"x": 1})
    assert (mine.needs.lockstep, other.needs.lockstep) == (True, False)
    for _ in range(3):
        driver.steps((mine, flat()), (other, flat()))
        assert torch.equal(driver.seen[1], flat())
    assert (mine.output, other.output) == ([7, 8, 9], [0, 0, 0])
    assert only.calls == [(7, []), (7, [7]), (7, [7, 8])]


def test_processors_come_after_penalties_and_bias(make_driver: Callable[..., Any]) -> None:
    class Watcher:
        seen: Any = None

        def admit(self, request: Any) -> Any:
            return 0  # any value but None

        def apply(self, state: int, logits: torch.Tensor, tokens: Any) -> None:
            self.seen = logits.clone()
            logits[11] = 99.0

    watcher = Watcher()
    driver = make_driver(processors=[watcher])
    request = driver.admit(presence_penalty=1.0, logit_bias=((5, 3.0),))
    driver.feed(request, [4, 5])
    driver.steps((request, flat()))
    assert (watcher.seen[4], watcher.seen[5], watcher.seen[11]) == (-1.0, 2.0, 0.0)
    assert request.output[-1] == 11


def test_conditions_are_called_in_order_after_the_request_s_own_stops(
    make_driver: Callable[..., Any], byte_level: Any
) -> None:
    class Says:
        def __init__(self, word: str, answer: str) -> None:
            self.word, self.answer = word, answer

        def admit(self, request: Any) -> Any:
            return None if request.params.ignore_eos else self.word

        def check(self, state: str, token: int, text: str) -> str | None:
            return self.answer if state in text else None

    driver = make_driver(byte_level, conditions=[Says("lo", "first"), Says("hello", "second"), Says("he", "third")])
    ids = [byte_level.encode(letter, add_special_tokens=False)[0] for letter in "hello"]
    assert driver.feed(driver.admit(), ids).finish == {"type": "stop", "matched": "third"}
    driver = make_driver(byte_level, conditions=[Says("lo", "first"), Says("hello", "second")])
    assert driver.feed(driver.admit(), ids).finish == {"type": "stop", "matched": "first"}
    assert driver.feed(driver.admit(stop=("lo",)), ids).finish == {"type": "stop", "matched": "lo"}
    assert driver.feed(driver.admit(stop_token_ids=(ids[-1],)), ids).finish == {"type": "stop", "matched": ids[-1]}
    assert driver.feed(driver.admit(max_new_tokens=len(ids)), ids).finish == {"type": "stop", "matched": "first"}
    untouched = driver.admit(ignore_eos=True, max_new_tokens=len(ids))
    assert driver.feed(untouched, ids).finish == {"type": "length", "length": len(ids)}


def test_conditions_without_a_tokenizer_get_no_text(make_driver: Callable[..., Any]) -> None:
    calls = []
    condition = SimpleNamespace(
        admit=lambda request: [], check=lambda state, token, text: calls.append((state, token, text))
    )
    driver = make_driver(conditions=[condition])
    driver.feed(driver.admit(), [5, 6])
    assert calls == [([], 5, ""), ([], 6, "")]


@pytest.mark.parametrize("custom", [None, {}, {"x": 1}])
def test_custom_params_without_extensions_are_refused(make_driver: Callable[..., Any], custom: Any) -> None:
    if custom:
        with pytest.raises(RequestError, match="custom_params are read by logits processors and stop") as caught:
            make_driver().admit(custom_params=custom)
        assert (caught.value.status, caught.value.param) == (400, "custom_params")
    else:
        make_driver().admit(custom_params=custom)
    make_driver(processors=[Only()]).admit(custom_params=custom)
    make_driver(conditions=[Faulty("check")]).admit(custom_params=custom)


@pytest.mark.parametrize("lacking", ["admit", "apply"])
def test_an_object_without_a_method_is_a_plugin_error(make_driver: Callable[..., Any], lacking: str) -> None:
    whole = {"admit": print, "apply": print}
    del whole[lacking]
    with pytest.raises(PluginError, match=rf"{ORIGIN[:16]}.*: SimpleNamespace has no method {lacking}"):
        make_driver(processors=[SimpleNamespace(**whole)])


# -- failures --------------------------------------------------------------------------------


def outcome(driver: Any, do: str) -> RequestError | None:
    """The error of a request with action ``do``; a request beside it in the batch must continue."""
    plain = driver.admit(key=2)
    try:
        request = driver.admit(key=1, custom_params={"do": do})
    except RequestError as error:
        return error
    step, other = driver.steps((request, flat()), (plain, flat()))
    assert (other.tokens, other.error) == ((0,), None)
    assert bool(step.tokens) == (step.error is None)
    error: RequestError | None = step.error
    return error


@pytest.mark.parametrize(
    ("where", "do"),
    [
        *((where, do) for where in ("admit", "apply", "check") for do in ("raise", "exit", "odd")),
        *(("apply", do) for do in ("nan", "nothing")),
        *(("check", do) for do in ("number", "long", "surrogate")),
    ],
)
def test_a_failure_ends_its_request_and_five_in_a_row_switch_the_object_off(
    make_driver: Callable[..., Any], caplog: pytest.LogCaptureFixture, where: str, do: str
) -> None:
    faulty = Faulty(where)
    driver = make_driver(**{"conditions" if where == "check" else "processors": [faulty]})
    for _ in range(MAX_FAILURES - 1):
        error = outcome(driver, do)
        assert error is not None
        assert (error.message, error.status) == (FAILED_MESSAGE, 500)
    assert outcome(driver, "good") is None, "a success must reset the count"
    running = driver.admit(key=3, custom_params={"do": "good"})
    for _ in range(MAX_FAILURES):
        error = outcome(driver, do)
        assert error is not None
        assert error.status == 500
    assert f"{ORIGIN}: Faulty.{where} " in caplog.text
    assert f"{ORIGIN}: Faulty is switched off: {where} failed 5 times in a row" in caplog.text
    for _ in range(2):
        error = outcome(driver, "good")
        assert error is not None
        assert error.status == 503
        assert error.message.startswith(f"{ORIGIN}: Faulty is switched off after 5 failures in a row.")
    (step,) = driver.steps((running, flat()))
    assert step.error.status == 503, "it may exist to enforce a rule"
    (step,) = driver.steps((driver.admit(key=4), flat()))
    assert step.tokens == (0,), "requests that it leaves alone must be served"


@pytest.mark.parametrize("where", ["admit", "apply", "check"])
def test_a_request_error_is_sent_to_the_client_and_is_no_failure(make_driver: Callable[..., Any], where: str) -> None:
    driver = make_driver(**{"conditions" if where == "check" else "processors": [Faulty(where)]})
    for _ in range(MAX_FAILURES + 1):
        error = outcome(driver, "answer")
        assert error is not None
        assert (error.status, error.message, error.param) == (422, "not with me", "custom_params")
    assert outcome(driver, "good") is None


def test_a_slow_call_is_logged_once(
    make_driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "SLOW_SECONDS", 0.001)
    monkeypatch.setitem(ACTIONS, "good", lambda logits: time.sleep(0.002))
    driver = make_driver(processors=[Faulty("apply")])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert outcome(driver, "good") is None
    slow = [record.getMessage() for record in caplog.records if "took" in record.getMessage()]
    assert len(slow) == 1
    assert slow[0].startswith(f"{ORIGIN}: Faulty.apply took 0.00 s, during which nothing else is served")


def test_logits_of_the_model_that_are_not_finite_are_no_failure_of_a_processor(make_driver: Callable[..., Any]) -> None:
    driver = make_driver(processors=[Only()])
    plain = driver.admit()
    (step,) = driver.steps((plain, torch.full((VOCABULARY,), torch.nan)))
    assert step.finish["message"].startswith("The model's logits were not finite")
