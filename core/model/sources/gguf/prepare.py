"""Prepares a GGUF file for serving: config and tokenizer as transformers reads them, and a table of its tensors.

Run as ``python -m trunkline.core.model.sources.gguf.prepare FILE FOLDER`` in a separate process, so that transformers'
parsers don't use the server's memory. The tensors' data stays in the file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .table import TABLE, Table, TensorPlace, identity_of

# transformers reads more, but ignores some of their keys and tensors without an error.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")  # a matrix for each expert of a layer
ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later; GGUF has no key for their rotary embedding
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def prepare(source: Path, folder: Path) -> None:
    """Write config.json, the tokenizer and the table for ``source`` into ``folder``, which must exist.

    ValueError for a file of another architecture, or with numbers or tensors that have no place in the model.
    """
    import torch
    import transformers
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader = GGUFReader(source)
    architecture = _value(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"its architecture is {architecture!r}; GGUF files are served of these: {known}")
    parsed: dict[str, Any] = theirs.load_gguf_checkpoint(source)["config"]
    options = {"gguf_file": source.name, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source.parent, **options)
    cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures, config.dtype = [cls.__name__], "bfloat16"
    if width := _value(reader, f"{architecture}.expert_feed_forward_length"):
        config.moe_intermediate_size = int(width)
    _set_rotary(config, reader, architecture)
    with torch.device("meta"):
        whole = cls(config)
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=parsed)
    names = theirs.get_gguf_hf_weights_map(whole, processor)
    experts = [one for one in reader.tensors if EXPERTS.fullmatch(one.name) and hasattr(config, "num_experts")]
    others = [one for one in reader.tensors if one.name not in (ROPE_FACTORS, *(expert.name for expert in experts))]
    if unknown := [tensor.name for tensor in others if tensor.name not in names]:
        raise ValueError(f"the model has no place for {len(unknown)} of its tensors, the first is {unknown[0]}")
    places = {names[one.name]: _entry(one, processor, names) for one in others}
    for tensor in experts:
        places |= _entries_of_experts(tensor)
    table = Table(str(source.resolve()), identity_of(source), places)
    config.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / TABLE).write_bytes(msgspec.json.encode(table))


def _value(reader: Any, key: str) -> Any:
    """The value of a key, None if the file doesn't have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _entry(tensor: Any, processor: Any, names: dict[str, str]) -> TensorPlace:
    """A tensor's place in the file, and the order of rows in which transformers expects it.

    transformers' function is called with a small array that shows what it does: the numbers of rows, in two columns.
    """
    shape = tuple(int(size) for size in reversed(tensor.shape))
    entry = TensorPlace(tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))
    columns = [[0.0, 0.5], [0.0]][len(shape) == 1]
    rows = np.arange(shape[0], dtype=np.float32)[:, None] + np.array(columns, np.float32)
    given = rows if len(shape) == 2 else rows[:, 0]
    result = processor.process(
        weights=given, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
    )
    changed: np.ndarray = result.weights
    if len(shape) <= 2 and result.name == tensor.name and changed.shape == given.shape:
        if np.array_equal(changed, given):
            return entry
        order = changed.reshape(len(rows), -1)[:, 0].astype(int).tolist()
        if sorted(order) == list(range(shape[0])) and np.array_equal(changed, given[order]):
            return msgspec.structs.replace(entry, order=order)
    raise ValueError(f"the tensor {tensor.name} ({'x'.join(map(str, shape))}) can't be served from GGUF")


def _entries_of_experts(tensor: Any) -> dict[str, TensorPlace]:
    """The places of the matrices in a tensor [E, N, K], under the names that they have in checkpoints of one each."""
    layer, part = EXPERTS.fullmatch(tensor.name).groups()  # type: ignore[union-attr]
    count, *shape = (int(size) for size in reversed(tensor.shape))
    size = int(tensor.n_bytes) // count
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": TensorPlace(
            tensor.tensor_type.name, tuple(shape), int(tensor.data_offset) + expert * size, size
        )
        for expert in range(count)
    }


def _set_rotary(config: Any, reader: Any, architecture: str) -> None:
    """Set what transformers doesn't read: the width of heads, and how the rotary embedding is scaled."""
    if width := _value(reader, f"{architecture}.attention.key_length"):
        config.head_dim = int(width)
    kind = _value(reader, f"{architecture}.rope.scaling.type")
    theta = {"rope_theta": config.rope_parameters["rope_theta"]}
    if kind in ("linear", "yarn"):
        factor = float(_value(reader, f"{architecture}.rope.scaling.factor"))
        config.rope_parameters = theta | {"rope_type": kind, "factor": factor}
        if original := _value(reader, f"{architecture}.rope.scaling.original_context_length"):
            config.rope_parameters["original_max_position_embeddings"] = int(original)
    elif kind not in (None, "none"):
        raise ValueError(f"its rotary embedding is scaled by {kind!r}, which can't be served from GGUF")
    if window := _value(reader, f"{architecture}.attention.sliding_window"):
        raise ValueError(f"it has a window of attention of {window} tokens, which can't be served from GGUF")
    factors = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is None:
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = np.asarray(factors.data, np.float32)
    config.rope_parameters = theta | {"rope_type": "llama3", "factor": float(given.max())} | LLAMA3
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    expected = theta["rope_theta"] ** -(np.arange(0, width, 2) / width) / given
    if not np.allclose(found.numpy(), expected, rtol=1e-3, atol=0.0):
        raise ValueError(f"{ROPE_FACTORS} has factors of frequencies that aren't those of Llama 3")


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # the libraries raise various exceptions for damaged files
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(1)
