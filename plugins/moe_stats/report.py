"""Makes the report for clients from a snapshot: shares, busiest experts, balancedness."""

from __future__ import annotations

from collections.abc import Sequence

from .reply_schemas import LayerReport, Report
from .schemas import Snapshot

TOP = 5  # number of busiest experts per layer in the report


def report(snapshot: Snapshot) -> Report:
    """The report of a snapshot.

    Balancedness is mean / maximum of a layer's counts: 1 if all experts have the same load,
    1/experts if one has all of it, null if nothing was counted. The model's is the mean of its layers'.
    """
    layers = [_layer(layer, counts) for layer, counts in zip(snapshot.layers, snapshot.counts, strict=True)]
    known = [layer["balancedness"] for layer in layers if layer["balancedness"] is not None]
    made: Report = {
        "model": snapshot.model,
        "mode": snapshot.mode,
        "recording": snapshot.recording,
        "passes": snapshot.passes,
        "tokens": snapshot.tokens,
        "top_k": snapshot.top_k,
        "num_layers": snapshot.depth,
        "num_experts": snapshot.experts,
        "balancedness": sum(known) / len(known) if known else None,
        "passes_without_record": snapshot.unrecorded,
        "layers": layers,
    }
    if snapshot.file:
        made["file"] = snapshot.file
    if snapshot.replicas:
        made["replicas"] = {name: report(one) for name, one in snapshot.replicas.items()}
    return made


def _layer(layer: int, counts: Sequence[int]) -> LayerReport:
    total, most = sum(counts), max(counts)
    busiest = sorted(range(len(counts)), key=lambda expert: -counts[expert])[:TOP]
    return {
        "layer": layer,
        "selections": total,
        "balancedness": total / len(counts) / most if most else None,
        "top": [
            {"expert": expert, "count": counts[expert], "share": counts[expert] / total}
            for expert in busiest
            if counts[expert]
        ],
        "counts": list(counts),
    }
