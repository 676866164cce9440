"""Runs one section of gpu_check.py. Each has a process of its own: an illegal address makes a CUDA context useless.

``python -m gpu.worker SECTION --records FILE``, in ``benchmarks/``, appends what it finds to FILE as lines of JSON.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from importlib import import_module
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", help="a function, as MODULE.FUNCTION")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--bandwidth", type=float, default=math.nan, help="bytes per second of a copy")
    parser.add_argument("--flops", type=float, default=math.nan, help="of a bfloat16 product, per second")
    parser.add_argument("--shard", type=int, nargs=2, default=(0, 1), metavar=("NUMBER", "COUNT"))
    parser.add_argument("--small", action="store_true", help="only a few cases")
    parser.add_argument("--skip", type=int, default=0, help="attempts that a process before this one has made")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of numbers in masked lanes
    from gpu.context import Context
    from trunkline.core.model.sources.catalogue import cache_folder
    from trunkline.kernels import compiled

    compiled.keep_in(cache_folder() / "kernels")  # where the engine looks for them
    context = Context(
        dry=options.dry_run,
        records=options.records,
        ends=time.monotonic() + options.seconds,
        bandwidth=options.bandwidth,
        flops=options.flops,
        shard=tuple(options.shard),
        small=options.small,
        skip=options.skip,
    )
    module, _, function = options.section.rpartition(".")
    getattr(import_module(module), function)(context)


if __name__ == "__main__":
    main()
