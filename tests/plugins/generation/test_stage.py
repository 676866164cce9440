"""The stage with a fake model: sampled tokens, ends of sequences, and failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trunkline.core.errors import RequestError
from trunkline.core.testing import run_stage
from trunkline.core.types import ModelInfo, Part, PartRow, Request, Step
from trunkline.kernels.adjust import adjust_reference
from trunkline.kernels.logprobs import logprobs_reference
from trunkline.kernels.sample import sample_reference
from trunkline.plugins.generation.grammar.engines import choose_engine
from trunkline.plugins.generation.grammar.grammars import Grammars
from trunkline.plugins.generation.sampling.extensions import Extensions
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams
from trunkline.plugins.generation.settings import RESERVED
from trunkline.plugins.generation.stage import GenerationStage

VOCABULARY = 400
EOS = 399
GREEDY: dict[str, Any] = {"temperature": 0.0}


class Driver:
    """Runs a stage token by token; hidden rows are the logits, as the head is the identity."""

    def __init__(self, tokenizer: Any = None, limit: int = 100) -> None:
        info = ModelInfo(
            path="",
            architecture="LlamaForCausalLM",
            model_type="llama",
            context_length=limit,
            vocab_size=VOCABULARY,
            hidden_size=VOCABULARY,
            causal=True,
            eos_token_ids=(EOS,),
        )
        self.calls = 0
        model: Any = SimpleNamespace(
            info=info,
            tokenizer=tokenizer,
            max_request_tokens=limit,
            heads={"lm": self._head},
            device=torch.device("cpu"),
            backend=SimpleNamespace(logprobs=logprobs_reference),
        )
        grammars = Grammars(model, choose_engine([], "none", model.info.vocab_size))
        self.stage = GenerationStage(model, sample_reference, adjust_reference, Extensions(), grammars)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden

    def admit(self, prompt: Sequence[int] = (1, 2, 3), key: int = 1, **params: Any) -> Request:
        request = Request(key, f"r{key}", "generation", GenerationParams(**params), list(prompt), len(prompt))
        request.needs = self.stage.admit(request)
        return request

    def steps(self, *rows: tuple[Request, torch.Tensor]) -> list[Step]:
        """Run a pass with these logits for each request; returns its steps."""
        lengths = [len(request.tokens) for request, _ in rows]
        parts = [
            PartRow(request, n - 1, n, n - 1, n, index, True)
            for index, ((request, _), n) in enumerate(zip(rows, lengths, strict=True))
        ]
        part = Part("generation", parts)
        steps = run_stage(self.stage, part, torch.stack([logits for _, logits in rows]))
        for step in steps:
            step.request.tokens.extend(step.tokens)
        return steps

    def feed(self, request: Request, tokens: Sequence[int]) -> Step:
        """Sample these tokens one by one until the request ends; returns the last step."""
        for token in tokens:
            (step,) = self.steps((request, peak(token)))
            if step.finish or step.error:
                return step
        return step


def peak(token: int) -> torch.Tensor:
    logits = torch.zeros(VOCABULARY)
    logits[token] = 10.0
    return logits


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_length(driver: Driver) -> None:
    request = driver.admit(max_new_tokens=3, **GREEDY)
    assert request.needs.new_tokens == 3
    assert driver.feed(request, [5, 6, 7, 8]).finish == {"type": "length", "length": 3}
    assert request.output == [5, 6, 7]


def test_length_is_cut_to_the_context(driver: Driver) -> None:
    request = driver.admit(prompt=[1] * 90, max_new_tokens=1000, **GREEDY)
    assert request.needs.new_tokens == 100 - RESERVED - 90


def test_no_new_tokens_needs_no_head(driver: Driver) -> None:
    request = driver.admit(max_new_tokens=0)
    (step,) = driver.steps((request, peak(5)))
    assert (step.tokens, step.finish) == ((), {"type": "length", "length": 0})
    assert driver.calls == 0


def test_no_new_tokens_beside_a_row_that_samples_one(driver: Driver) -> None:
    none, one = driver.admit(key=1, max_new_tokens=0), driver.admit(key=2, max_new_tokens=4, **GREEDY)
    first, second = driver.steps((none, peak(5)), (one, peak(6)))
    assert (first.tokens, second.tokens) == ((), (6,))


def test_eos_ends_and_stays_in_the_output(driver: Driver) -> None:
    request = driver.admit(**GREEDY)
    assert driver.feed(request, [5, EOS]).finish == {"type": "stop", "matched": EOS}
    assert request.output == [5, EOS]


def test_stop_token_ids(driver: Driver) -> None:
    assert driver.feed(driver.admit(stop_token_ids=(7,), **GREEDY), [5, 7]).finish == {"type": "stop", "matched": 7}


def test_ignore_eos_ignores_stop_token_ids_too(driver: Driver) -> None:
    request = driver.admit(stop_token_ids=(7,), ignore_eos=True, max_new_tokens=4, **GREEDY)
    assert driver.feed(request, [7, EOS, 7, EOS]).finish == {"type": "length", "length": 4}


def test_a_stop_token_at_the_limit_is_a_stop(driver: Driver) -> None:
    request = driver.admit(max_new_tokens=2, **GREEDY)
    assert driver.feed(request, [5, EOS]).finish == {"type": "stop", "matched": EOS}


@pytest.mark.parametrize("room", [0, 50])
def test_stop_strings_across_tokens(byte_level: Any, room: int) -> None:
    """Also if the last allowed token completes the stop string."""
    driver = Driver(byte_level)
    ids = byte_level.encode("hello wor", add_special_tokens=False)
    request = driver.admit(max_new_tokens=len(ids) + room, stop=("zz", "o wo"), **GREEDY)
    last = driver.feed(request, ids)
    assert last.finish == {"type": "stop", "matched": "o wo"}
    assert byte_level.decode(request.output).startswith("hello wo")


def test_a_stop_string_in_the_prompt_does_not_count(byte_level: Any) -> None:
    driver = Driver(byte_level)
    prompt = byte_level.encode("hello", add_special_tokens=False)
    ids = byte_level.encode(" fox", add_special_tokens=False)
    request = driver.admit(prompt, max_new_tokens=len(ids), stop=("hello",), **GREEDY)
    assert driver.feed(request, ids).finish == {"type": "length", "length": len(ids)}


@pytest.mark.field
@pytest.mark.parametrize("stop", ["<|im_start|>", "hello<|im_start|>", "o<|im", "<|im_start|> f"])
def test_a_stop_string_may_be_or_contain_a_special_token(byte_level: Any, stop: str) -> None:
    driver = Driver(byte_level)
    ids = byte_level.encode("hello<|im_start|> fox", add_special_tokens=False)
    request = driver.admit(stop=(stop,), **GREEDY)
    assert driver.feed(request, ids).finish == {"type": "stop", "matched": stop}
    text = byte_level.decode(request.output, skip_special_tokens=False)
    assert stop in text
    assert stop not in byte_level.decode(request.output[:-1], skip_special_tokens=False)


@pytest.mark.field
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_text_may_be_given_as_a_stop_string(byte_level: Any, ignore_eos: bool) -> None:
    """As in SGLang, a stop string is reported before a stop token."""
    driver = Driver(byte_level)
    ids = byte_level.encode("hello<|im_end|>", add_special_tokens=False)
    request = driver.admit(stop=("<|im_end|>",), ignore_eos=ignore_eos, **GREEDY)
    assert driver.feed(request, ids).finish == {"type": "stop", "matched": "<|im_end|>"}
    other = driver.admit(stop=("<|im_start|>",), **GREEDY)
    assert driver.feed(other, ids).finish == {"type": "stop", "matched": byte_level.eos_token_id}


def test_stop_strings_need_a_tokenizer(driver: Driver) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        driver.admit(stop=("x",))


def test_logits_that_are_not_finite_end_their_request_only(driver: Driver) -> None:
    broken, whole = driver.admit(key=1), driver.admit(key=2, **GREEDY)
    bad, good = driver.steps((broken, torch.full((VOCABULARY,), torch.nan)), (whole, peak(6)))
    assert bad.finish is not None
    assert (bad.finish["type"], bad.finish["status_code"]) == ("abort", 500)
    assert bad.tokens == ()
    assert (good.tokens, good.finish) == ((6,), None)


def test_logits_that_are_not_finite_have_no_log_probabilities(driver: Driver) -> None:
    broken, whole, plain = (
        driver.admit(key=key, logprobs=logprobs, **GREEDY)
        for key, logprobs in ((1, LogprobParams()), (2, LogprobParams(top=1)), (3, None))
    )
    bad, good, usual = driver.steps((broken, torch.full((VOCABULARY,), torch.nan)), (whole, peak(6)), (plain, peak(7)))
    assert (bad.finish or {})["type"] == "abort"
    assert bad.data is None
    assert good.tokens == (6,)
    assert good.data.output.chosen_ids == good.data.output.top_ids == (6).to_bytes(4, "little")
    assert good.data.output.chosen == good.data.output.top
    assert (usual.tokens, usual.data) == ((7,), None)


def test_a_row_whose_results_fail_ends_alone(driver: Driver) -> None:
    broken, whole = (driver.admit(key=key, logprobs=LogprobParams(), **GREEDY) for key in (1, 2))
    # The namespace has no mark_sent:
    broken.state.extras = SimpleNamespace(prompt_len=3, logprobs=LogprobParams(), hidden="", logprobs_due=2)
    bad, good = driver.steps((broken, peak(5)), (whole, peak(6)))
    assert bad.error is not None
    assert (bad.error.status, good.tokens) == (500, (6,))


@pytest.mark.parametrize("ids", [(5, VOCABULARY), (-1,)])
def test_log_probabilities_of_ids_outside_the_vocabulary_are_refused(driver: Driver, ids: tuple[int, ...]) -> None:
    """The stage checks them, too, because scripts call the engine without the front's checks."""
    with pytest.raises(RequestError, match=r"out-of-vocabulary token id (400|-1); valid range is \[0, 400\)"):
        driver.admit(logprobs=LogprobParams(ids=ids))


def test_a_failing_row_ends_alone(driver: Driver, byte_level: Any) -> None:
    driver = Driver(byte_level)
    broken, whole = driver.admit(key=1, stop=("x",), **GREEDY), driver.admit(key=2, **GREEDY)
    broken.state.text = object()  # any error in a tokenizer's decoder
    bad, good = driver.steps((broken, peak(5)), (whole, peak(6)))
    assert bad.error is not None
    assert bad.error.status == 500
    assert good.tokens == (6,)


def test_a_sampled_token_depends_on_seed_and_position_only(driver: Driver) -> None:
    """Other rows and retraction don't change it; another seed does."""
    flat = torch.zeros(VOCABULARY)

    def drawn(seed: int, beside: Callable[[], list[Request]] = list) -> list[int]:
        request = driver.admit(key=seed * 10, seed=seed, ignore_eos=True)
        for _ in range(8):
            driver.steps(*((other, flat) for other in beside()), (request, flat))
        return request.output

    others = [driver.admit(key=7, seed=5), driver.admit(key=8, **GREEDY)]
    assert drawn(1) == drawn(1, lambda: others)
    assert drawn(1) != drawn(2)


def test_parameters_change_with_the_rows(driver: Driver) -> None:
    """The parameter tensors of the last pass aren't used for other rows."""
    flat = peak(3) / 100
    greedy, hot = driver.admit(key=1, **GREEDY), driver.admit(key=2, temperature=50.0, seed=3, ignore_eos=True)
    alone = [driver.steps((greedy, flat))[0].tokens for _ in range(3)]
    assert alone == [(3,)] * 3
    mixed = [[step.tokens for step in driver.steps((hot, flat), (greedy, flat))] for _ in range(3)]
    assert [row[1] for row in mixed] == [(3,)] * 3
    assert any(row[0] != (3,) for row in mixed)


def test_the_probe_is_admitted(driver: Driver) -> None:
    prompt, params = driver.stage.probe()
    request = Request(1, "probe", "generation", params, prompt, len(prompt))
    assert driver.stage.admit(request).new_tokens == 1
