"""Log-probabilities and hidden states of a real engine, against transformers on the same fp32 weights.

Values are within 1e-4 in chunks, mixed batches, with cached prefixes, retraction, samples and streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.core.testing import ZOO
from trunkline.core.types import PartRow, Request
from trunkline.plugins.generation.sampling.extra_rows import ExtraState

NEAR = 1e-4
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
IDS = [7, 500, 3]  # token_ids_logprob


def prompts() -> list[list[int]]:
    """Prompts of 5, 23 and 41 tokens, and one that shares 33 tokens with the third."""
    draw = torch.Generator().manual_seed(7)
    first, second, third = (torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 23, 41))
    return [first, second, third, third[:33] + first]


class Reference:
    """transformers' own model."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        )

    @torch.inference_mode()
    def rows(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """``log_softmax``, float64 ``[len(ids), V]``; row ``p`` predicts the token at ``p + 1``."""
        logits: torch.Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return (logits.double() / temperature).log_softmax(-1)

    @torch.inference_mode()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        output = self.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        last: torch.Tensor = output.hidden_states[-1][0]
        return last

    def check(self, record: dict[str, Any], prompt: list[int], start: int, top: int, temperature: float = 1.0) -> None:
        """Check all lists of a record whose request had :data:`IDS` as token_ids_logprob."""
        meta, output = record["meta_info"], record["output_ids"]
        ids = prompt + output
        plain, with_temperature = self.rows(ids), self.rows(ids, temperature)
        positions = range(start, len(prompt)) if start >= 0 else range(0)
        entries = meta["input_token_logprobs"]
        assert [entry[1] for entry in entries] == [prompt[position] for position in positions]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == output
        if entries:
            assert entries[0][0] is None
            assert meta["input_token_ids_logprobs"][0] is None
        for index, position in enumerate(positions):
            if index:
                self._entry(plain[position - 1], meta, "input", index, prompt[position], top)
        for index, token in enumerate(output):
            self._entry(with_temperature[len(prompt) - 1 + index], meta, "output", index, token, top)

    def _entry(self, expected: torch.Tensor, meta: dict[str, Any], kind: str, index: int, token: int, top: int) -> None:
        value, token_id, text = meta[f"{kind}_token_logprobs"][index]
        assert (token_id, text) == (token, None)
        assert abs(value - expected[token].item()) <= NEAR, (kind, index)
        assert [entry[1] for entry in meta[f"{kind}_token_ids_logprobs"][index]] == IDS
        for entry in meta[f"{kind}_token_ids_logprobs"][index]:
            assert abs(entry[0] - expected[entry[1]].item()) <= NEAR
        if not top:
            assert f"{kind}_top_logprobs" not in meta
            return
        best = meta[f"{kind}_top_logprobs"][index]
        for entry, likely in zip(best, expected.topk(top).values.tolist(), strict=True):
            assert abs(entry[0] - expected[entry[1]].item()) <= NEAR
            assert abs(entry[0] - likely) <= NEAR


@cache
def reference(path: Path) -> Reference:
    return Reference(path)


STARTS = [0, 7, -1, 20]
TOPS = [3, 0, 5, 1]


def ask_all(engine: Any, **more: Any) -> list[dict[str, Any]]:
    """Send all prompts at once, each with another logprob_start_len and top_logprobs_num."""
    body = {
        "input_ids": prompts(),
        "return_logprob": True,
        "logprob_start_len": STARTS,
        "top_logprobs_num": TOPS,
        "token_ids_logprob": IDS,
        "sampling_params": GREEDY | {"max_new_tokens": 12},
    }
    return engine(**body | more)


def check_all(engine: Any, records: list[dict[str, Any]]) -> None:
    for record, prompt, start, top in zip(records, prompts(), STARTS, TOPS, strict=True):
        reference(engine.path).check(record, prompt, start, top)


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", ZOO)
def test_chunks_mixed_batches_and_cached_prefixes(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], name: str, backend: str
) -> None:
    engine = recorded_engine(zoo(name), attention_backend=backend, chunked_prefill_size=9)
    check_all(engine, ask_all(engine))
    assert any(0 < batch.decodes < len(batch.rows) for batch in engine.batches), "no batch mixed decoding and prefill"
    assert any(not row.final for batch in engine.batches for row in batch.rows), "no prompt was cut into chunks"
    records = ask_all(engine)
    check_all(engine, records)
    # The cached prefix is used up to the start.
    cached = [record["meta_info"]["cached_tokens"] for record in records]
    assert cached == [
        min(len(prompt) - 1, start) if start >= 0 else len(prompt) - 1
        for prompt, start in zip(prompts(), STARTS, strict=True)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2-moe"])
def test_retraction_under_a_pool_that_is_too_small(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], name: str
) -> None:
    engine = recorded_engine(zoo(name), chunked_prefill_size=8, max_total_tokens=76)
    engine.lane.scheduler.reserve.ratio = 0.0  # reserve no slots for output, so that the pool becomes full
    check_all(engine, ask_all(engine))
    assert engine.retracted, "nothing was retracted"


class Retract:
    """Retracts each request twice: when part of its prompt's log-probabilities has been sent, and during decoding."""

    def __init__(self) -> None:
        self.halves: set[int] = set()
        self.later: set[int] = set()

    def __call__(self, request: Request) -> bool:
        start, due = request.params.logprobs.start, request.state.extras.logprobs_due
        half = start is not None and start < due < request.prompt_len - 1
        times = self.halves if half else self.later
        if request.key in times or not (half or request.output_len >= 3):
            return False
        times.add(request.key)
        return True


@pytest.mark.parametrize("cached", [True, False])
def test_a_retraction_sends_nothing_twice(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], cached: bool
) -> None:
    """For retractions in the middle of the prompt and during decoding."""
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9, disable_radix_cache=not cached)
    engine.must_retract = retract = Retract()
    check_all(engine, ask_all(engine))
    assert (len(retract.halves), len(retract.later)) == (2, 4)


@pytest.mark.parametrize("bug", ["skip", "repeat"])
def test_seeded_bugs_are_detected(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """Seeded bugs: a row is skipped at the end of each chunk; everything is sent again after a retraction."""

    def skip(self: ExtraState, row: PartRow) -> None:
        self.logprobs_due = row.end + 1

    def repeat(self: ExtraState, row: PartRow) -> None:
        pass

    monkeypatch.setattr(ExtraState, "mark_sent", skip if bug == "skip" else repeat)
    with pytest.raises(AssertionError):
        test_a_retraction_sends_nothing_twice(zoo, recorded_engine, cached=True)


def test_what_was_sent_is_not_computed_again_after_a_retraction(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    """No row goes through the head twice, and the whole prefix is reused if its log-probabilities were sent."""
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9)
    engine.must_retract = Retract()
    rows = engine.watch_head()
    check_all(engine, ask_all(engine))
    of_prompts = [len(prompt) - 1 - start for prompt, start in zip(prompts(), STARTS, strict=True) if start >= 0]
    assert sum(rows) == sum(of_prompts) + 4 * 12
    assert engine.retracted
    assert {(request.needs.rows_from, request.needs.reuse_up_to) for request in engine.retracted} == {(None, None)}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_applies_to_output_and_not_to_input(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], temperature: float
) -> None:
    """top_k, top_p and min_p change neither."""
    engine = recorded_engine(zoo("llama"))
    sampling = {"temperature": temperature, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "sampling_seed": 5}
    records = ask_all(engine, sampling_params=sampling | {"max_new_tokens": 12, "ignore_eos": True})
    for record, prompt, start, top in zip(records, prompts(), STARTS, TOPS, strict=True):
        reference(engine.path).check(record, prompt, start, top, temperature)


def test_the_greedy_token_is_the_most_likely_one(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    for record in ask_all(recorded_engine(zoo("llama")), top_logprobs_num=4):
        meta = record["meta_info"]
        assert meta["output_token_logprobs"] == [top[0] for top in meta["output_top_logprobs"]]


def test_no_new_tokens_give_one_output_entry(zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]) -> None:
    engine = recorded_engine(zoo("llama"))
    longer = ask_all(engine, sampling_params=GREEDY | {"max_new_tokens": 1})
    for record, other, prompt in zip(
        ask_all(engine, sampling_params=GREEDY | {"max_new_tokens": 0}), longer, prompts(), strict=True
    ):
        meta = record["meta_info"]
        assert (record["output_ids"], meta["completion_tokens"]) == ([], 0)
        assert meta["finish_reason"] == {"type": "length", "length": 0}
        assert [entry[1] for entry in meta["output_token_logprobs"]] == other["output_ids"]
        for name in ("input_token_logprobs", "output_token_logprobs", "output_token_ids_logprobs"):
            flat, expected = _flat(meta[name]), _flat(other["meta_info"][name])
            assert flat == pytest.approx(expected, abs=1e-5), (len(prompt), name)


def _flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in _flat(item)]
    return [value] if isinstance(value, int | float) else []


def test_samples_share_one_computation_of_the_prompt(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    engine = recorded_engine(zoo("llama"))
    sampling = {"max_new_tokens": 6, "temperature": 1.3, "n": 3, "sampling_seed": 3, "ignore_eos": True}
    body = {"return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 2, "token_ids_logprob": IDS}
    records = engine(input_ids=prompts()[1:3], sampling_params=sampling, **body)
    for index, record in enumerate(records):
        prompt = prompts()[1:3][index // 3]
        reference(engine.path).check(record, prompt, 2, 2, 1.3)
        assert record["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert len({tuple(record["output_ids"]) for record in records}) == 6


def test_streams_are_cumulative_and_end_like_the_whole_reply(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9)
    body: dict[str, Any] = {
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 3,
        "token_ids_logprob": IDS,
        "return_hidden_states": True,
        "sampling_params": GREEDY | {"max_new_tokens": 10},
    }
    prompt = prompts()[2]
    (whole,) = engine(input_ids=[prompt], **body)
    engine.flush()
    seen = engine.stream(input_ids=prompt, **body)
    reference(engine.path).check(whole, prompt, 1, 3)
    assert len(seen) > 3
    lists = [name for name in whole["meta_info"] if name.endswith("logprobs")]
    assert len(lists) == 6
    for frame in seen:
        meta = frame["meta_info"]
        assert len(meta["input_token_logprobs"]) == len(prompt) - 1
        assert len(frame["output_ids"]) == meta["completion_tokens"] == len(meta["hidden_states"])
        for name in lists:
            length = len(meta[name])
            assert length == (len(frame["output_ids"]) if name.startswith("output") else len(prompt) - 1)
            assert _flat(meta[name]) == pytest.approx(_flat(whole["meta_info"][name][:length]), abs=1e-5)
    assert _flat(seen[-1]["meta_info"]["hidden_states"]) == pytest.approx(
        _flat(whole["meta_info"]["hidden_states"]), abs=1e-3
    )


def test_a_large_answer_is_encoded_in_a_thread_and_is_the_same(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in streams with large results: those that arrive during encoding are in this frame or in the next one."""
    from trunkline.plugins.generation import service

    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9)
    usual = ask_all(engine)
    monkeypatch.setattr(service, "ON_LOOP_BYTES", 0)
    threads: list[int] = []
    off_loop = engine.engine.client.off_loop

    async def counted(function: Any, *args: Any, size: int = 0) -> Any:
        threads.append(size)
        await asyncio.sleep(0.01)
        return await off_loop(function, *args, size=size)

    monkeypatch.setattr(engine.engine.client, "off_loop", counted)
    again = ask_all(engine)
    assert threads
    check_all(engine, again)
    assert [record["output_ids"] for record in again] == [record["output_ids"] for record in usual]
    seen = engine.stream(
        input_ids=prompts()[2], return_logprob=True, logprob_start_len=0, top_logprobs_num=2, token_ids_logprob=IDS,
        sampling_params=GREEDY | {"max_new_tokens": 30},
    )  # fmt: skip
    reference(engine.path).check(seen[-1], prompts()[2], 0, 2)
    for frame in seen:
        assert len(frame["output_ids"]) == len(frame["meta_info"]["output_token_logprobs"])
    assert [frame["meta_info"]["finish_reason"] is None for frame in seen] == [True] * (len(seen) - 1) + [False]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-moe", "gpt2"])
def test_hidden_states_are_those_of_the_last_layer(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], name: str
) -> None:
    """A matrix for the uncached part of the prompt, then a vector for each token but the last."""
    engine = recorded_engine(zoo(name), chunked_prefill_size=9)
    body: dict[str, Any] = {"input_ids": prompts(), "sampling_params": GREEDY | {"max_new_tokens": 6}}
    plain = engine(**body)
    engine.flush()
    for _ in range(2):  # with an empty cache, and with all in it
        for record, prompt in zip(engine(**body, return_hidden_states=True), prompts(), strict=True):
            matrix, *vectors = record["meta_info"]["hidden_states"]
            cached = record["meta_info"]["cached_tokens"]
            expected = reference(engine.path).hidden(prompt + record["output_ids"])[cached:-1]
            found = torch.tensor(matrix + vectors)
            assert (len(matrix), len(vectors)) == (len(prompt) - cached, 5)
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    for record, other in zip(engine(**body, return_hidden_states="last"), plain, strict=True):
        assert record["output_ids"] == other["output_ids"]
        assert len(record["meta_info"]["hidden_states"]) == expected.shape[1]
    last = reference(engine.path).hidden(prompts()[3] + record["output_ids"])[-2]
    assert (torch.tensor(record["meta_info"]["hidden_states"]) - last).abs().max() <= 1e-3 * last.abs().max()


def test_hidden_states_survive_retraction(zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]) -> None:
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=8, max_total_tokens=76)
    engine.lane.scheduler.reserve.ratio = 0.0
    records = engine(
        input_ids=prompts(), return_hidden_states=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )  # fmt: skip
    assert engine.retracted
    for record, prompt in zip(records, prompts(), strict=True):
        matrix, *vectors = record["meta_info"]["hidden_states"]
        cached = record["meta_info"]["cached_tokens"]
        expected = reference(engine.path).hidden(prompt + record["output_ids"])[cached:-1]
        assert (len(matrix), len(vectors)) == (len(prompt) - cached, 11)
        assert (torch.tensor(matrix + vectors) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_no_new_tokens_give_the_hidden_states_of_the_prompt(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    engine = recorded_engine(zoo("llama"))
    (record,) = engine(input_ids=[prompts()[1]], return_hidden_states=True, sampling_params={"max_new_tokens": 0})
    (matrix,) = record["meta_info"]["hidden_states"]
    expected = reference(engine.path).hidden(prompts()[1])
    assert (torch.tensor(matrix) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_long_results_are_computed_in_slices_and_sent_in_pieces(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head runs over slices of the rows, and results are cut into pieces."""
    from trunkline.plugins.generation.sampling import extra_results

    engine = recorded_engine(zoo("llama"))
    monkeypatch.setattr(extra_results, "SLICE", 4 * 512 * 5)
    monkeypatch.setattr(extra_results, "PIECE", 2000)
    rows = engine.watch_head()
    records = ask_all(engine, return_hidden_states=True)
    check_all(engine, records)
    assert max(rows) <= 5
    hidden = records[1]["meta_info"]["hidden_states"]
    assert (len(hidden), len(hidden[0])) == (12, len(prompts()[1]) - records[1]["meta_info"]["cached_tokens"])


def test_requests_without_extra_outputs_have_no_row_selection(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    """No row is selected for extra outputs."""
    engine = recorded_engine(zoo("llama"))
    stage = engine.lane.stages["generation"].stage
    selections: list[Any] = []
    launch = stage.launch

    def watch(part: Any, hidden: torch.Tensor) -> Any:
        selections.append(part.inputs.selection)
        return launch(part, hidden)

    stage.launch = watch
    (record,) = engine(input_ids=[prompts()[1]], sampling_params=GREEDY | {"max_new_tokens": 4})
    assert selections == [None] * 4
    assert not {name for name in record["meta_info"] if "logprob" in name or "hidden" in name}


def test_a_pass_that_fails_and_is_run_again_sends_nothing_twice(
    zoo: Callable[[str], Path], recorded_engine: Callable[..., Any]
) -> None:
    """Each of its rows is run again alone. Rows are marked as sent when they are collected, not before."""
    engine = recorded_engine(zoo("llama"), chunked_prefill_size=9)
    stage = engine.lane.stages["generation"].stage
    launch, together = stage.launch, [0]

    def flaky(part: Any, hidden: torch.Tensor) -> Any:
        launched = launch(part, hidden)
        together[0] += len(part.rows) > 1
        if len(part.rows) > 1 and together[0] % 2:
            raise RuntimeError("for the test")
        return launched

    stage.launch = flaky
    check_all(engine, ask_all(engine))
    assert together[0] > 4
