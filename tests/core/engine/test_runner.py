from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from msgspec import Struct

from trunkline.core.cache.pool import SlotTable
from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.engine.runner import Runner, split_by_task
from trunkline.core.engine.scheduling.row import Row
from trunkline.core.types import Launched, Needs, Part, Request, Stage, Step
from trunkline.kernels.layout import Layout


class Params(Struct):
    pass


class Recorder(Stage):
    """Keeps what it was given."""

    task = "record"
    params = Params
    result = Params

    def __init__(self) -> None:
        self.seen: list[tuple[Part, torch.Tensor]] = []

    def admit(self, request: Request) -> Needs:
        return Needs()

    def prepare(self, part: Part) -> None:
        part.inputs, part.arrays = "prepared", {"keys": np.arange(len(part.rows))}

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        assert part.inputs == "prepared"
        assert part.tensors["keys"].tolist() == list(range(len(part.rows)))
        self.seen.append((part, hidden.clone()))
        return Launched(hidden[:, 0].long(), {"hidden": hidden})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        return []

    def probe(self) -> tuple[list[int], Params]:
        return [0], Params()


class Second(Recorder):
    task = "second"


class Echo:
    """A model whose hidden row is (token id, position)."""

    layout: Layout
    types: torch.Tensor | None
    wanted: torch.Tensor | None
    lengths: torch.Tensor | None
    embeds: tuple[torch.Tensor, torch.Tensor] | None

    def __init__(self, token_types: bool = False, length_boundaries: tuple[int, ...] = ()) -> None:
        self.token_types, self.length_boundaries, self.captures = token_types, length_boundaries, False

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        layout: Layout,
        pool: object,
        token_types: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        embeds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        self.layout, self.types, self.wanted, self.lengths = layout, token_types, wanted, lengths
        self.embeds = embeds
        hidden = torch.stack([input_ids, positions], 1).float()
        return hidden if wanted is None else hidden[wanted]


def request(task: str, tokens: list[int], rows_from: int | None = None, rows_up_to: int | None = None) -> Request:
    needs = Needs(rows_from=rows_from, rows_up_to=rows_up_to)
    return Request(key=0, rid="", task=task, params=None, tokens=tokens, prompt_len=len(tokens), needs=needs)


def share(request: Request, start: int, end: int, table_row: int) -> Row:
    return Row(request, start, end, table_row, final=end == len(request.tokens))


def test_each_stage_gets_the_rows_it_wants_and_nothing_else() -> None:
    decode = request("record", [7, 8, 9])
    chunk = request("record", list(range(10, 20)))  # not its last chunk: no row wanted
    scored = request("second", list(range(30, 36)), rows_from=2)
    rows = [share(decode, 2, 3, 0), share(chunk, 0, 4, 1), share(scored, 0, 5, 2)]
    model, first, second, table = Echo(), Recorder(), Second(), SlotTable(3, 16)
    table.slots[:] = np.arange(48).reshape(3, 16)
    results = Runner(model, {"record": first, "second": second}, None, table, CpuDevice()).start(rows).wait()

    ((part, hidden),) = first.seen
    assert [row.request for row in part.rows] == [decode]
    assert hidden.tolist() == [[9, 2]]
    assert part.rows[0].final
    ((part, hidden),) = second.seen
    assert hidden.tolist() == [[32, 2], [33, 3], [34, 4]]
    assert (part.rows[0].first, part.rows[0].offset, part.rows[0].final) == (2, 0, False)
    assert [tensors["next_ids"].tolist() for _, tensors in results] == [[9], [32, 33, 34]]
    assert model.wanted is not None
    assert model.wanted.tolist() == [0, 7, 8, 9]  # the model may leave out the others


def test_a_pass_may_want_all_rows_or_none() -> None:
    model, stage, table = Echo(), Recorder(), SlotTable(3, 16)
    runner = Runner(model, {"record": stage}, None, table, CpuDevice())
    runner.start([share(request("record", [7, 8]), 1, 2, 0), share(request("record", [5]), 0, 1, 1)])
    assert model.wanted is None
    assert runner.start([share(request("record", list(range(10))), 0, 4, 1)]).wait() == []
    assert model.wanted is not None
    assert model.wanted.tolist() == []


def test_the_layout_says_where_everything_lies() -> None:
    decoding = request("record", [1, 2])
    decoding.prompt_len = 1
    rows = [share(decoding, 1, 2, 2), share(request("record", [3, 4, 5]), 1, 3, 0)]
    model, table = Echo(), SlotTable(3, 4)
    table.slots[:] = np.arange(12).reshape(3, 4)
    Runner(model, {"record": Recorder()}, None, table, CpuDevice()).start(rows)
    layout = model.layout
    assert layout.q_start.tolist() == [0, 1, 3]
    assert layout.kv_len.tolist() == [2, 3]
    assert layout.table_row.tolist() == [2, 0]
    assert layout.out_slots.tolist() == [9, 1, 2]
    assert layout.decodes == 1


def test_the_last_token_of_a_prompt_is_no_decoding_row() -> None:
    """Whether the rest was cached or not, it takes the same kernels."""
    decoding, prompt = request("record", [1, 2]), request("record", [3, 4])
    decoding.prompt_len = 1
    for rows, decodes in (([decoding], 1), ([prompt], 0), ([decoding, prompt], 1)):
        model, table = Echo(), SlotTable(2, 4)
        Runner(model, {"record": Recorder()}, None, table, CpuDevice()).start(
            [share(one, 1, 2, i) for i, one in enumerate(rows)]
        )
        assert model.layout.decodes == decodes


def test_lengths_are_told_where_one_exceeds_a_boundary() -> None:
    table = SlotTable(2, 8)
    model = Echo(length_boundaries=(3,))
    rows = [share(request("record", [1, 2, 3]), 0, 3, 0), share(request("record", [1, 2, 3, 4, 5]), 1, 3, 1)]
    Runner(model, {"record": Recorder()}, None, table, CpuDevice()).start(rows)
    assert model.lengths is not None
    assert model.lengths.tolist() == [3, 3, 3, 5, 5]
    Runner(model, {"record": Recorder()}, None, table, CpuDevice()).start(rows[:1])
    assert model.lengths is None


def test_token_types_follow_the_second_text() -> None:
    pair, chunk, single = (request("record", [1, 2, 3, 4]) for _ in range(3))
    pair.second_at, chunk.second_at = 3, 1
    rows = [share(pair, 0, 4, 0), share(chunk, 2, 4, 1), share(single, 0, 2, 2)]
    table = SlotTable(3, 4)
    model = Echo(token_types=True)
    runner = Runner(model, {"record": Recorder()}, None, table, CpuDevice())
    runner.start(rows)
    assert model.types is not None
    assert model.types.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    runner.start(rows[2:])
    assert model.types is None
    plain = Echo()
    Runner(plain, {"record": Recorder()}, None, table, CpuDevice()).start(rows)
    assert plain.types is None


def test_offsets_of_a_part_follow_its_rows() -> None:
    rows = [
        share(request("record", [1, 2, 3], rows_from=1), 0, 3, 0),
        share(request("record", [1, 2, 3, 4], rows_from=0), 2, 4, 1),
        share(request("record", [5]), 0, 1, 2),
    ]
    ((part, wanted),) = split_by_task(rows)
    assert [(row.first, row.offset) for row in part.rows] == [(1, 0), (2, 2), (0, 4)]
    assert wanted == [1, 2, 3, 4, 5]


def test_a_stage_that_needs_few_rows_gets_every_final_row() -> None:
    first_chunk, middle, last_chunk = (request("record", list(range(9)), 1, 3) for _ in range(3))
    whole, before = request("record", [1, 2, 3], 0, 1), request("record", [1, 2, 3], 2, 3)
    rows = [
        share(first_chunk, 0, 2, 0),
        share(middle, 4, 6, 1),
        share(last_chunk, 6, 9, 2),
        share(whole, 0, 3, 3),
        share(before, 0, 1, 4),
    ]
    ((part, wanted),) = split_by_task(rows)
    assert [row.request for row in part.rows] == [first_chunk, last_chunk, whole]
    assert [(row.first, row.stop, row.offset) for row in part.rows] == [(1, 2, 0), (6, 6, 1), (0, 1, 1)]
    assert wanted == [1, 7]


def test_embeddings_are_told_by_packed_index() -> None:
    ids, mixed, decoding = (request("record", list(range(length))) for length in (5, 6, 3))
    mixed.embeds, decoding.embeds = np.arange(8, dtype=np.float32).reshape(4, 2), np.ones((2, 2), np.float32)
    rows = [share(ids, 1, 5, 0), share(mixed, 2, 6, 1), share(decoding, 2, 3, 2)]
    model, table = Echo(), SlotTable(3, 16)
    runner = Runner(model, {"record": Recorder()}, None, table, CpuDevice())
    runner.start(rows)
    assert model.embeds is not None
    indices, values = model.embeds
    assert (indices.tolist(), values.tolist()) == ([4, 5], [[4, 5], [6, 7]])
    runner.start(rows[::2])
    assert model.embeds is None
