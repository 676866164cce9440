"""Change the logits of some rows before sampling: penalties for generated tokens, then biases; masks of allowed tokens.

Only what a row asks for is touched: the rows that aren't named keep every bit.
"""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.sampling import token_mask
from trunkline.kernels.cpu.sampling.adjust import LARGEST, kernel


def adjust_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    penalties: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    bias_starts: torch.Tensor,
    bias_ids: torch.Tensor,
    biases: torch.Tensor,
) -> None:
    """Plain torch. Overwrites ``logits``, float32 [R, V].

    ``rows`` int64 [A]: the rows to change, each at most once. ``penalties`` float64 [A, 3]: frequency, presence and
    repetition (> 0; 0, 0 and 1 change nothing). Two lists of ids for each of these rows, no id twice in a list::

        ids       [ row 0 | row 1 | … ]      int64 [N]; starts int64 [A + 1]
        counts    [ row 0 | row 1 | … ]      float32 [N]: how often each was generated
        bias_ids, biases, bias_starts        the same; biases float32, -inf forbids an id

    With x = logits[row, id], first ``x -= frequency * count + presence``, then ``x *= repetition`` where x < 0 and
    ``x /= repetition`` elsewhere (in float64; a finite x stays within ±1e30), at last ``x += bias``.
    """
    table = torch.arange(len(rows), device=logits.device)
    owner = torch.repeat_interleave(table, starts.diff(), output_size=len(ids))
    frequency, presence, repetition = penalties[owner].unbind(-1)
    before = logits[rows[owner], ids].double()
    after = before - (frequency * counts.double() + presence)
    after = torch.where(after < 0, after * repetition, after / repetition)
    after = torch.where(torch.isfinite(before), after.clamp(-LARGEST, LARGEST), after)
    logits[rows[owner], ids] = after.float()
    owner = torch.repeat_interleave(table, bias_starts.diff(), output_size=len(bias_ids))
    logits[rows[owner], bias_ids] += biases


def adjust_cpu(
    logits: torch.Tensor,
    rows: torch.Tensor,
    penalties: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    bias_starts: torch.Tensor,
    bias_ids: torch.Tensor,
    biases: torch.Tensor,
) -> None:
    """The same by a compiled loop. IndexError for an id outside [0, V).

    On the calling thread: 64 rows with 2000 ids each take 0.8 ms, and waking other threads gained nothing.
    """
    vocabulary = logits.shape[1]
    for listed in (ids.numpy(), bias_ids.numpy()):  # numpy's min and max stay on this thread
        if len(listed) and not (listed.min() >= 0 and listed.max() < vocabulary):
            raise IndexError(f"ids to adjust must lie in [0, {vocabulary})")
    if logits.stride(1) != 1:
        adjust_reference(logits, rows, penalties, starts, ids, counts, bias_starts, bias_ids, biases)
        return
    kernel().run(
        1,
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        count=len(rows),
        rows=rows.data_ptr(),
        penalties=penalties.data_ptr(),
        starts=starts.data_ptr(),
        ids=ids.data_ptr(),
        counts=counts.data_ptr(),
        bias_starts=bias_starts.data_ptr(),
        bias_ids=bias_ids.data_ptr(),
        biases=biases.data_ptr(),
    )


def mask_tokens_reference(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Plain torch. Overwrites ``logits``, float32 [R, V]: -inf for the tokens that aren't allowed.

    ``rows`` int64 [G]: the rows to change, each at most once. ``masks`` int32 [G, ceil(V / 32)]: token i of a row is
    allowed if bit i % 32 of word i // 32 is set.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    allowed = (masks[:, ids // 32] >> (ids % 32).int()) & 1
    logits[rows] = logits[rows].masked_fill(allowed == 0, -torch.inf)


def mask_tokens_cpu(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """The same by a compiled loop, on the calling thread: 15 µs for a row of 49,152 tokens."""
    if logits.stride(1) != 1 or not masks.is_contiguous():
        mask_tokens_reference(logits, rows, masks)
        return
    token_mask.kernel().run(
        1,
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        vocabulary=logits.shape[1],
        count=len(rows),
        rows=rows.data_ptr(),
        masks=masks.data_ptr(),
        words=masks.shape[1],
    )
