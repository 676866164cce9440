"""Tokenizers in a process that leaves torch out, as the front does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.core.model import tokenizer
from trunkline.core.types import ModelSource

TEXT = "The other line, there: Ünïcode, 数 and\n\n  spaces 123.</s><s>"
FRONT = """
import json, sys
from trunkline.core.model import tokenizer
from trunkline.core.types import ModelSource

tokenizer.import_without_torch()
loaded = tokenizer.load(ModelSource("", sys.argv[1]))
ids = loaded.encode(sys.argv[2])
chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
print(json.dumps([ids, loaded.decode(ids), loaded.all_special_ids, chat, "torch" in sys.modules]))
import torch
"""


def test_without_torch_everything_is_the_same(zoo: Callable[[str], Path]) -> None:
    folder = zoo("llama")
    done = subprocess.run([sys.executable, "-c", FRONT, str(folder), TEXT], capture_output=True, text=True, check=True)
    here: Any = tokenizer.load(ModelSource("", str(folder)))
    ids = here.encode(TEXT)
    chat = here.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert json.loads(done.stdout) == [ids, here.decode(ids), here.all_special_ids, chat, False]
    assert done.stderr == ""


def test_a_torch_that_is_there_stays(zoo: Callable[[str], Path]) -> None:
    import torch

    tokenizer.import_without_torch()
    assert sys.modules["torch"] is torch
