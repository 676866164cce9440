"""Where requests go: to the longest cached prefix, unless the replica that has it is over the bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.core.cluster.routing import BLOCK, DECODE_WORK, PrefixRouting, Prompt, Sent
from trunkline.core.engine.messages import Load

NAMES = ["a", "b", "c", "d"]
SLOTS = 100 * BLOCK


def routing(names: Sequence[str] = NAMES, slots: int = SLOTS) -> PrefixRouting:
    made = PrefixRouting()
    for name in names:
        made.add(name, slots)
    return made


def ids(seed: int, blocks: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 1000, blocks * BLOCK, dtype=np.int32).astype("<i4").tobytes()


def prompt(seed: int, blocks: int = 4, namespace: bytes = b"") -> Prompt:
    return Prompt.of(ids(seed, blocks), namespace)


def finish(made: PrefixRouting, replica: str, asked: Prompt, output: bytes = b"") -> None:
    sent = made.sent(replica, asked)
    made.computed(sent)
    made.ended(sent, output)


def load(waiting: int = 0, running: int = 0) -> Load:
    return Load("m", waiting, running, 0, SLOTS, SLOTS)


# -- prefixes --------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=4 * BLOCK), st.lists(st.integers(0, 3), max_size=2 * BLOCK), st.binary())
def test_hashes_are_those_of_prefixes(tokens: list[int], rest: list[int], namespace: bytes) -> None:
    first, longer = (np.array(each, "<i4").tobytes() for each in (tokens, tokens + rest))
    short, extended = Prompt.of(first, namespace), Prompt.of(longer, namespace)
    assert short.tokens == len(tokens)
    assert len(short.prefixes) == len(tokens) // BLOCK
    assert extended.prefixes[: len(short.prefixes)] == short.prefixes
    assert short.extended(np.array(rest, "<i4").tobytes()) == extended
    assert len(set(extended.prefixes)) == len(extended.prefixes)
    assert not {*short.prefixes} & {*Prompt.of(first, namespace + b"x").prefixes}


@given(st.integers(0, 4 * BLOCK - 1))
def test_one_other_token_changes_all_longer_prefixes(at: int) -> None:
    tokens = np.frombuffer(ids(0, 4), "<i4").copy()
    before = Prompt.of(tokens.tobytes()).prefixes
    tokens[at] += 1
    after = Prompt.of(tokens.tobytes()).prefixes
    assert [a == b for a, b in zip(before, after, strict=True)] == [index < at // BLOCK for index in range(4)]


# -- affinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", NAMES)
def test_a_repeated_prefix_goes_to_its_replica(holder: str) -> None:
    made = routing()
    finish(made, holder, prompt(1))
    assert made.choose(prompt(1).extended(ids(2, 3)))[0] == holder


def test_the_longest_prefix_comes_first() -> None:
    made = routing()
    for name, blocks in (("b", 1), ("d", 4), ("a", 2)):
        finish(made, name, Prompt.of(ids(1, 4)[: blocks * BLOCK * 4]))
    assert made.choose(prompt(1)) == ["d", "a", "b", "c"]


@pytest.mark.parametrize("holder", NAMES)
def test_a_prompt_of_one_block_goes_where_it_is_a_prefix(holder: str) -> None:
    """As in tests/api/test_contract.py: 50 tokens, the beginning of 100."""
    made = routing()
    finish(made, holder, Prompt.of(ids(1, 4)[: 4 * 100]))
    assert made.choose(Prompt.of(ids(1, 4)[: 4 * 50]))[0] == holder


def test_an_answer_is_part_of_what_is_cached() -> None:
    made = routing()
    finish(made, "c", prompt(1), ids(2, 3))
    finish(made, "b", prompt(1))
    assert made.choose(prompt(1).extended(ids(2, 3) + ids(3, 1)))[0] == "c"


def test_namespaces_share_nothing() -> None:
    made = routing()
    elsewhere = made.choose(prompt(1, namespace=b"x"))
    holder = elsewhere[-1]
    finish(made, holder, prompt(1, namespace=b"y"))
    assert made.choose(prompt(1, namespace=b"x")) == elsewhere
    assert made.choose(prompt(1, namespace=b"y"))[0] == holder


def test_a_flushed_replica_holds_nothing() -> None:
    made = routing()
    before = made.choose(prompt(1))
    finish(made, before[-1], prompt(1))
    made.flush(before[-1])
    assert made.choose(prompt(1)) == before


def test_as_much_is_remembered_as_the_pool_holds() -> None:
    made = routing(slots=8 * BLOCK)
    before = made.choose(prompt(1))
    holder = before[-1]
    finish(made, holder, prompt(1))
    finish(made, holder, prompt(2))
    assert made.choose(prompt(1))[0] == holder  # both fit
    finish(made, holder, prompt(1))
    finish(made, holder, prompt(3))  # evicts the second, which was used longest ago
    assert made.choose(prompt(1))[0] == holder
    assert made.choose(prompt(2)) == routing().choose(prompt(2))


def test_of_a_prompt_the_end_is_evicted_first() -> None:
    made = routing(slots=6 * BLOCK)
    finish(made, "a", prompt(1))
    finish(made, "a", prompt(2))
    sent = made.sent("a", prompt(1))
    assert sent.work == 2 * BLOCK + DECODE_WORK


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.booleans()), max_size=60), st.integers(1, 10))
def test_what_is_cached_is_bounded_and_made_of_prefixes(steps: list[tuple[int, int, bool]], blocks: int) -> None:
    made = routing(["a"], slots=blocks * BLOCK)
    for seed, length, ends in steps:
        asked = prompt(seed, length)
        sent = made.sent("a", asked)
        if ends:
            made.ended(sent, ids(seed + 100, 1))
        cached = sent.replica.cached
        assert len(cached) <= blocks
        held = [prefix in cached for prefix in prompt(seed, 12).prefixes]
        assert held == sorted(held, reverse=True), "a prefix was evicted before what extends it"
        assert sent.replica.cached_tokens(prompt(seed, 12)) == BLOCK * sum(held)


# -- load ------------------------------------------------------------------------------------


def flood(made: PrefixRouting, replica: str, count: int = 5) -> list[Sent]:
    return [made.sent(replica, prompt(1000 + index, 8)) for index in range(count)]


def test_over_the_bound_it_goes_elsewhere_until_the_work_is_done() -> None:
    made = routing()
    finish(made, "a", prompt(1))
    waiting = flood(made, "a")
    assert made.choose(prompt(1))[-1] == "a"
    for sent in waiting:
        made.computed(sent)
    assert made.choose(prompt(1))[0] == "a", "five requests that decode are below the bound"
    for sent in waiting:
        made.ended(sent)
    assert made.choose(prompt(1))[0] == "a"


def test_equal_loads_everywhere_change_nothing() -> None:
    made = routing()
    finish(made, "a", prompt(1))
    for name in NAMES:
        flood(made, name)
    assert made.choose(prompt(1))[0] == "a"


def test_requests_of_other_fronts_count() -> None:
    made = routing()
    finish(made, "a", prompt(1, 16))
    made.observe("a", load(waiting=100, running=10))
    assert made.choose(prompt(1))[-1] == "a"
    made.observe("a", load())
    assert made.choose(prompt(1))[0] == "a"


def test_own_requests_in_a_heartbeat_are_not_counted_twice() -> None:
    made, same = routing(), routing()
    for each in (made, same):
        flood(each, "a", 3)
    made.observe("a", load(waiting=1, running=2))
    assert [made.choose(prompt(seed)) for seed in range(20)] == [same.choose(prompt(seed)) for seed in range(20)]


def test_new_prompts_are_divided_among_idle_replicas() -> None:
    made = routing()
    firsts = [made.choose(prompt(seed))[0] for seed in range(400)]
    assert all(60 <= firsts.count(name) <= 140 for name in NAMES)


# -- replicas --------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.booleans()), max_size=40))
def test_only_replicas_that_are_there_are_chosen(steps: list[tuple[str, int, bool]]) -> None:
    made, there = routing([]), set[str]()
    open_requests = []
    for name, seed, change in steps:
        if change and name in there:
            made.remove(name)
            there.remove(name)
        elif change:
            made.add(name, SLOTS)
            there.add(name)
        elif name in there:
            open_requests.append(made.sent(name, prompt(seed)))
        elif open_requests:
            made.ended(open_requests.pop(), ids(9, 1))  # of a replica that may be gone
        assert sorted(made.choose(prompt(seed))) == sorted(there)


def test_nothing_is_sent_to_a_replica_that_is_gone() -> None:
    made = routing()
    made.remove("a")
    with pytest.raises(KeyError):
        made.sent("a", prompt(1))


def test_a_replica_that_comes_back_has_nothing() -> None:
    made = routing()
    before = made.choose(prompt(1))
    sent = made.sent(before[-1], prompt(1))
    made.remove(before[-1])
    made.add(before[-1], SLOTS)
    made.ended(sent)
    assert made.choose(prompt(1)) == before


@given(st.permutations(NAMES), st.integers(0, 1000), st.integers(0, 3), st.binary(max_size=3))
def test_fronts_agree_about_new_prompts(order: list[str], seed: int, blocks: int, namespace: bytes) -> None:
    asked = prompt(seed, blocks, namespace)
    assert routing(order).choose(asked) == routing().choose(asked)


def test_when_one_is_gone_the_new_prompts_of_others_stay_where_they_are() -> None:
    whole, fewer = routing(), routing(["a", "b", "d"])
    for seed in range(50):
        assert fewer.choose(prompt(seed)) == [name for name in whole.choose(prompt(seed)) if name != "c"]
