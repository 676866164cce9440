"""``python -m gate MODULE TARGET…``: rows as JSON, one per line, for process.py."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

from .compiling import compile_here
from .rows import Launch


def load(path: Path) -> ModuleType:
    """The module of launches, which imports this package as ``gate``."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", type=Path)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--seed", type=int, help="random order; without it the order of the module")
    options = parser.parse_args()
    module = load(options.module)
    work: list[tuple[Launch, str]] = [
        (launch, target) for target in options.targets for launch in module.launches(target)
    ]
    if options.seed is not None:
        random.Random(options.seed).shuffle(work)
    for launch, target in work:
        for row in compile_here([launch], target):
            print(json.dumps(row.as_json()), flush=True)
        print(json.dumps({"done": launch.name, "of": len(work)}), flush=True)


main()
