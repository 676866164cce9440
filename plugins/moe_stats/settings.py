"""Settings of the expert statistics: TOML table ``[moe_stats]`` and flags, most of them SGLang's."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

GROUP = "moe_stats"
FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
START, STOP, DUMP, LOOK = "experts_start", "experts_stop", "experts_dump", "experts_look"  # controls

Mode = Literal["stat", "stat_approx", "per_pass", "per_token"]


class MoeStatsSettings(Struct, frozen=True):
    """Every field is a flag: ``expert_dump_dir`` is ``--expert-dump-dir``."""

    expert_distribution_recorder_mode: Annotated[
        Mode,
        Meta(
            description="Content of expert dumps: counts per pass (stat; stat_approx is the same), a record per pass "
            "(per_pass), or also the experts of each token (per_token)."
        ),
    ] = "stat"
    expert_distribution_recorder_buffer_size: Annotated[
        int,
        Meta(
            ge=-1,
            le=1_000_000,
            description="Number of passes in a stat dump, of which the first includes all older ones; 0 or -1: as many "
            "as --expert-record-bytes allows.",
        ),
    ] = 1000
    enable_expert_distribution_metrics: Annotated[
        bool, Meta(description="Record expert statistics from the start.")
    ] = False
    expert_dump_dir: Annotated[
        str,
        Meta(description=f"Folder of expert dumps; default {FOLDER_VARIABLE}, else a private temporary folder."),
    ] = ""
    expert_record_bytes: Annotated[
        int,
        Meta(
            ge=1 << 16,
            le=1 << 44,
            description="Limit on the memory of a model's record, bytes; passes beyond it are counted in totals only.",
        ),
    ] = 1 << 30
