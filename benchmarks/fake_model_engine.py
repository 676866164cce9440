"""An engine process with a fake model: a pass takes the time of :class:`.replica.Cost`, whatever the model computes.

``fake_model_engine.py FIXED PER_TOKEN PER_DECODE SPEED FD``, in seconds; benchmarks/cluster/real.py starts it. All else
is the real engine process, which serves a tiny random model: a pass of that takes less than the time to which this
extends it.
"""

from __future__ import annotations

import sys
import time
from unittest import mock

from cluster.replica import Cost

from trunkline.core.engine import process
from trunkline.core.engine.flight import BatchInFlight
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.scheduling.batch import Batch


def main() -> int:
    fixed, per_token, per_decode, speed = map(float, sys.argv[1:5])
    cost, compute = Cost(fixed, per_token, per_decode), Lane.start

    def start(lane: Lane, batch: Batch, previous: BatchInFlight | None = None) -> BatchInFlight:
        began = time.perf_counter()
        flight = compute(lane, batch, previous)
        time.sleep(max(0.0, began + cost.seconds(batch, speed) - time.perf_counter()))
        return flight

    with mock.patch.object(Lane, "start", start), mock.patch.object(sys, "argv", [sys.argv[0], sys.argv[-1]]):
        return process.main()


if __name__ == "__main__":
    sys.exit(main())
