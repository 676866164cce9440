"""Log-probabilities and hidden states through the whole engine, against transformers on the same fp32 weights.

Values within 1e-4 whatever the scheduler does: chunks, mixed batches, cached prefixes, retraction, samples, streams.
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
from trunkline.plugins.generation.sampling.rows import RowState

NEAR = 1e-4
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
IDS = [7, 500, 3]  # asked for


def prompts() -> list[list[int]]:
    """Of 5, 23 and 41 tokens, and one that shares 33 tokens with the last."""
    draw = torch.Generator().manual_seed(7)
    first, second, third = (torch.randint(4, 500, (n,), generator=draw).tolist() for n in (5, 23, 41))
    return [first, second, third, third[:33] + first]


class Truth:
    """transformers' own model."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        )

    @torch.inference_mode()
    def rows(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """``log_softmax`` float32 ``[len(ids), V]``; row ``p`` is about the token at ``p + 1``."""
        logits: torch.Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return (logits.double() / temperature).log_softmax(-1)

    @torch.inference_mode()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        output = self.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        last: torch.Tensor = output.hidden_states[-1][0]
        return last

    def check(self, record: dict[str, Any], prompt: list[int], start: int, top: int, temperature: float = 1.0) -> None:
        """All lists of a record that asked for :data:`IDS`."""
        meta, output = record["meta_info"], record["output_ids"]
        ids = prompt + output
        plain, heated = self.rows(ids), self.rows(ids, temperature)
        asked = range(start, len(prompt)) if start >= 0 else range(0)
        entries = meta["input_token_logprobs"]
        assert [entry[1] for entry in entries] == [prompt[position] for position in asked]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == output
        if entries:
            assert entries[0][0] is None
            assert meta["input_token_ids_logprobs"][0] is None
        for index, position in enumerate(asked):
            if index:
                self._entry(plain[position - 1], meta, "input", index, prompt[position], top)
        for index, token in enumerate(output):
            self._entry(heated[len(prompt) - 1 + index], meta, "output", index, token, top)

    def _entry(self, expected: torch.Tensor, meta: dict[str, Any], kind: str, index: int, token: int, top: int) -> None:
        value, ident, text = meta[f"{kind}_token_logprobs"][index]
        assert (ident, text) == (token, None)
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
def truth(path: Path) -> Truth:
    return Truth(path)


STARTS = [0, 7, -1, 20]
TOPS = [3, 0, 5, 1]


def ask_all(one: Any, **more: Any) -> list[dict[str, Any]]:
    """All prompts at once, with different starts and numbers of most likely ids."""
    body = {
        "input_ids": prompts(),
        "return_logprob": True,
        "logprob_start_len": STARTS,
        "top_logprobs_num": TOPS,
        "token_ids_logprob": IDS,
        "sampling_params": GREEDY | {"max_new_tokens": 12},
    }
    return one(**body | more)


def check_all(one: Any, records: list[dict[str, Any]]) -> None:
    for record, prompt, start, top in zip(records, prompts(), STARTS, TOPS, strict=True):
        truth(one.path).check(record, prompt, start, top)


@pytest.mark.parametrize("backend", ["torch_native", "cpu"])
@pytest.mark.parametrize("name", ZOO)
def test_chunks_mixed_batches_and_cached_prefixes(
    zoo: Callable[[str], Path], asked: Callable[..., Any], name: str, backend: str
) -> None:
    one = asked(zoo(name), attention_backend=backend, chunked_prefill_size=9)
    check_all(one, ask_all(one))
    assert any(0 < batch.decodes < len(batch.rows) for batch in one.batches), "no batch mixed decoding and prefill"
    assert any(not row.final for batch in one.batches for row in batch.rows), "no prompt was cut into chunks"
    records = ask_all(one)
    check_all(one, records)
    # A start gives up what lies behind it, and no more.
    cached = [record["meta_info"]["cached_tokens"] for record in records]
    assert cached == [
        min(len(prompt) - 1, start) if start >= 0 else len(prompt) - 1
        for prompt, start in zip(prompts(), STARTS, strict=True)
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2-moe"])
def test_retraction_under_a_pool_that_is_too_small(
    zoo: Callable[[str], Path], asked: Callable[..., Any], name: str
) -> None:
    one = asked(zoo(name), chunked_prefill_size=8, max_total_tokens=76)
    one.lane.scheduler._new_token_ratio = 0.0  # admit with optimism, so that the pool does run dry
    check_all(one, ask_all(one))
    assert one.retracted, "nothing was retracted"


class Retract:
    """Chooses each request twice: when a part of its prompt has been sent, and when it has some output."""

    def __init__(self) -> None:
        self.halves: set[int] = set()
        self.later: set[int] = set()

    def __call__(self, request: Request) -> bool:
        start, due = request.params.logprobs.start, request.state.rows.due
        half = start is not None and start < due < request.prompt_len - 1
        times = self.halves if half else self.later
        if request.key in times or not (half or request.output_len >= 3):
            return False
        times.add(request.key)
        return True


@pytest.mark.parametrize("cached", [True, False])
def test_a_retraction_sends_nothing_twice(zoo: Callable[[str], Path], asked: Callable[..., Any], cached: bool) -> None:
    """Neither of a prompt that was half sent nor of output."""
    one = asked(zoo("llama"), chunked_prefill_size=9, disable_radix_cache=not cached)
    one.victim = retract = Retract()
    check_all(one, ask_all(one))
    assert (len(retract.halves), len(retract.later)) == (2, 4)


@pytest.mark.parametrize("bug", ["skip", "repeat"])
def test_seeded_bugs_are_caught(
    zoo: Callable[[str], Path], asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """A row is skipped at the end of each chunk; all is sent again after a retraction."""

    def skip(self: RowState, row: PartRow) -> None:
        self.due = row.end + 1

    def repeat(self: RowState, row: PartRow) -> None:
        pass

    monkeypatch.setattr(RowState, "sent", skip if bug == "skip" else repeat)
    with pytest.raises(AssertionError):
        test_a_retraction_sends_nothing_twice(zoo, asked, cached=True)


def test_what_was_sent_costs_nothing_after_a_retraction(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    """No row goes through the head twice, and a request whose prompt was sent may reuse all of it."""
    one = asked(zoo("llama"), chunked_prefill_size=9)
    one.victim = Retract()
    rows = one.watch_head()
    check_all(one, ask_all(one))
    of_prompts = [len(prompt) - 1 - start for prompt, start in zip(prompts(), STARTS, strict=True) if start >= 0]
    assert sum(rows) == sum(of_prompts) + 4 * 12
    assert one.retracted
    assert {(one.needs.rows_from, one.needs.reuse_up_to) for one in one.retracted} == {(None, None)}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_output_is_after_temperature_and_input_is_not(
    zoo: Callable[[str], Path], asked: Callable[..., Any], temperature: float
) -> None:
    """Neither is after top_k, top_p and min_p."""
    one = asked(zoo("llama"))
    sampling = {"temperature": temperature, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "sampling_seed": 5}
    records = ask_all(one, sampling_params=sampling | {"max_new_tokens": 12, "ignore_eos": True})
    for record, prompt, start, top in zip(records, prompts(), STARTS, TOPS, strict=True):
        truth(one.path).check(record, prompt, start, top, temperature)


def test_the_greedy_entry_is_the_first_of_the_most_likely(
    zoo: Callable[[str], Path], asked: Callable[..., Any]
) -> None:
    for record in ask_all(asked(zoo("llama")), top_logprobs_num=4):
        meta = record["meta_info"]
        assert meta["output_token_logprobs"] == [top[0] for top in meta["output_top_logprobs"]]


def test_no_new_tokens_give_one_output_entry(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    one = asked(zoo("llama"))
    longer = ask_all(one, sampling_params=GREEDY | {"max_new_tokens": 1})
    for record, other, prompt in zip(
        ask_all(one, sampling_params=GREEDY | {"max_new_tokens": 0}), longer, prompts(), strict=True
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
        return [number for one in value for number in _flat(one)]
    return [value] if isinstance(value, int | float) else []


def test_samples_share_one_computation_of_the_prompt(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    one = asked(zoo("llama"))
    sampling = {"max_new_tokens": 6, "temperature": 1.3, "n": 3, "sampling_seed": 3, "ignore_eos": True}
    body = {"return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 2, "token_ids_logprob": IDS}
    records = one(input_ids=prompts()[1:3], sampling_params=sampling, **body)
    for index, record in enumerate(records):
        prompt = prompts()[1:3][index // 3]
        truth(one.path).check(record, prompt, 2, 2, 1.3)
        assert record["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert len({tuple(record["output_ids"]) for record in records}) == 6


def test_streams_are_cumulative_and_end_as_the_whole(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    one = asked(zoo("llama"), chunked_prefill_size=9)
    body: dict[str, Any] = {
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 3,
        "token_ids_logprob": IDS,
        "return_hidden_states": True,
        "sampling_params": GREEDY | {"max_new_tokens": 10},
    }
    prompt = prompts()[2]
    (whole,) = one(input_ids=[prompt], **body)
    one.flush()
    seen = one.stream(input_ids=prompt, **body)
    truth(one.path).check(whole, prompt, 1, 3)
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
    zoo: Callable[[str], Path], asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams whose results pile up, too: what comes meanwhile is in the frame or in the next one, never lost."""
    from trunkline.plugins.generation import service

    one = asked(zoo("llama"), chunked_prefill_size=9)
    usual = ask_all(one)
    monkeypatch.setattr(service, "BACKLOG", 0)
    threads: list[int] = []
    off_loop = one.engine.client.off_loop

    async def counted(function: Any, *args: Any, size: int = 0) -> Any:
        threads.append(size)
        await asyncio.sleep(0.01)
        return await off_loop(function, *args, size=size)

    monkeypatch.setattr(one.engine.client, "off_loop", counted)
    again = ask_all(one)
    assert threads
    check_all(one, again)
    assert [record["output_ids"] for record in again] == [record["output_ids"] for record in usual]
    seen = one.stream(
        input_ids=prompts()[2], return_logprob=True, logprob_start_len=0, top_logprobs_num=2, token_ids_logprob=IDS,
        sampling_params=GREEDY | {"max_new_tokens": 30},
    )  # fmt: skip
    truth(one.path).check(seen[-1], prompts()[2], 0, 2)
    for frame in seen:
        assert len(frame["output_ids"]) == len(frame["meta_info"]["output_token_logprobs"])
    assert [frame["meta_info"]["finish_reason"] is None for frame in seen] == [True] * (len(seen) - 1) + [False]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-moe", "gpt2"])
def test_hidden_states_are_those_of_the_last_layer(
    zoo: Callable[[str], Path], asked: Callable[..., Any], name: str
) -> None:
    """A matrix for the uncached part of the prompt, then a vector for each token but the last."""
    one = asked(zoo(name), chunked_prefill_size=9)
    body: dict[str, Any] = {"input_ids": prompts(), "sampling_params": GREEDY | {"max_new_tokens": 6}}
    plain = one(**body)
    one.flush()
    for _ in range(2):  # with an empty cache, and with all in it
        for record, prompt in zip(one(**body, return_hidden_states=True), prompts(), strict=True):
            matrix, *vectors = record["meta_info"]["hidden_states"]
            cached = record["meta_info"]["cached_tokens"]
            expected = truth(one.path).hidden(prompt + record["output_ids"])[cached:-1]
            found = torch.tensor(matrix + vectors)
            assert (len(matrix), len(vectors)) == (len(prompt) - cached, 5)
            assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    for record, other in zip(one(**body, return_hidden_states="last"), plain, strict=True):
        assert record["output_ids"] == other["output_ids"]
        assert len(record["meta_info"]["hidden_states"]) == expected.shape[1]
    last = truth(one.path).hidden(prompts()[3] + record["output_ids"])[-2]
    assert (torch.tensor(record["meta_info"]["hidden_states"]) - last).abs().max() <= 1e-3 * last.abs().max()


def test_hidden_states_survive_retraction(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    one = asked(zoo("llama"), chunked_prefill_size=8, max_total_tokens=76)
    one.lane.scheduler._new_token_ratio = 0.0
    records = one(
        input_ids=prompts(), return_hidden_states=True, sampling_params=GREEDY | {"max_new_tokens": 12}
    )  # fmt: skip
    assert one.retracted
    for record, prompt in zip(records, prompts(), strict=True):
        matrix, *vectors = record["meta_info"]["hidden_states"]
        cached = record["meta_info"]["cached_tokens"]
        expected = truth(one.path).hidden(prompt + record["output_ids"])[cached:-1]
        assert (len(matrix), len(vectors)) == (len(prompt) - cached, 11)
        assert (torch.tensor(matrix + vectors) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_no_new_tokens_give_the_hidden_states_of_the_prompt(
    zoo: Callable[[str], Path], asked: Callable[..., Any]
) -> None:
    one = asked(zoo("llama"))
    (record,) = one(input_ids=[prompts()[1]], return_hidden_states=True, sampling_params={"max_new_tokens": 0})
    (matrix,) = record["meta_info"]["hidden_states"]
    expected = truth(one.path).hidden(prompts()[1])
    assert (torch.tensor(matrix) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_what_is_long_comes_in_slices_and_pieces(
    zoo: Callable[[str], Path], asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head runs over as many rows as their logits have room; results are cut, too."""
    from trunkline.plugins.generation.sampling import row_results

    one = asked(zoo("llama"))
    monkeypatch.setattr(row_results, "SLICE", 4 * 512 * 5)
    monkeypatch.setattr(row_results, "PIECE", 2000)
    rows = one.watch_head()
    records = ask_all(one, return_hidden_states=True)
    check_all(one, records)
    assert max(rows) <= 5
    hidden = records[1]["meta_info"]["hidden_states"]
    assert (len(hidden), len(hidden[0])) == (12, len(prompts()[1]) - records[1]["meta_info"]["cached_tokens"])


def test_requests_that_ask_for_nothing_pay_nothing(zoo: Callable[[str], Path], asked: Callable[..., Any]) -> None:
    """No result beside tokens is made for them; the head runs once a pass over the rows that are sampled."""
    one = asked(zoo("llama"))
    stage = one.lane.stages["generation"].stage
    plans: list[Any] = []
    launch = stage.launch

    def watch(part: Any, hidden: torch.Tensor) -> Any:
        plans.append(part.inputs)
        return launch(part, hidden)

    stage.launch = watch
    (record,) = one(input_ids=[prompts()[1]], sampling_params=GREEDY | {"max_new_tokens": 4})
    assert plans == [None] * 4
    assert not {name for name in record["meta_info"] if "logprob" in name or "hidden" in name}


def test_a_pass_that_fails_and_is_run_again_sends_nothing_twice(
    zoo: Callable[[str], Path], asked: Callable[..., Any]
) -> None:
    """Its rows are run alone then; what was sent is noted only when it was collected."""
    one = asked(zoo("llama"), chunked_prefill_size=9)
    stage = one.lane.stages["generation"].stage
    launch, together = stage.launch, [0]

    def flaky(part: Any, hidden: torch.Tensor) -> Any:
        launched = launch(part, hidden)
        together[0] += len(part.rows) > 1
        if len(part.rows) > 1 and together[0] % 2:
            raise RuntimeError("for the test")
        return launched

    stage.launch = flaky
    check_all(one, ask_all(one))
    assert together[0] > 4
