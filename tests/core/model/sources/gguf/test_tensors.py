"""GGUF files are served as they are: the same numbers, kept as integers; and which files are refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from trunkline.core import Engine
from trunkline.core.errors import ModelError
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.fusion.origins import read
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sources.gguf import folder, prepare
from trunkline.core.model.sources.gguf.folder import folder_of
from trunkline.core.model.sources.gguf.table import TensorPlace
from trunkline.core.model.sources.gguf.tensors import QuantizedGgufTensor, is_prepared, stream
from trunkline.core.model.sources.quantized_tensor import QuantizedTensor
from trunkline.core.model.sources.tensor_file import StoredTensor, file_identity, open_regular
from trunkline.core.model.transforms import stored
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.plugins.generation.offline import generate

from .conftest import merge_experts

KEPT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # the package can write them
Write = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are prepared in this process, which has imported all that takes long; but for one test."""

    def run(command: Sequence[str], *_: Any) -> tuple[int, str]:
        try:
            prepare.prepare(Path(command[-2]), Path(command[-1]))
        except Exception as error:
            return 1, str(error)
        return 0, ""

    monkeypatch.setattr(folder, "run", run)


def start(file: Path, **options: Any) -> Engine:
    return Engine(str(file), dtype="float32", threads=1, **options)


def model_of(engine: Engine) -> LoadedModel:
    transport: Any = engine.client.transport
    model: LoadedModel = transport.loop.lanes[0].model
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", [*KEPT, "F16"])
def test_logits_are_those_of_the_dequantised_weights(
    write_gguf: Write, checkpoint: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    tensors = write_gguf(tmp_path / "model.gguf", name, kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    reference.load_state_dict(tensors, strict=False)
    ids = torch.arange(5, 69)
    with start(tmp_path / "model.gguf") as engine, torch.inference_mode():
        model = model_of(engine)
        hidden = model.forward(ids, torch.arange(64), packed_layout([64]), None)
        found, expected = model.heads["lm"](hidden), reference(ids[None]).logits[0]
        stored = engine.client.models[0].stored_as
    error = float((found - expected).norm() / expected.norm())
    if kind == "F16":
        assert error < 1e-4
        assert stored == ""
    else:  # rows are quantised
        assert error < 0.05
        assert stored == "8 of 8 matrices as gguf"


def test_experts(write_gguf: Write, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As floats, to compare logits: rounded rows would choose other experts. As integers, to compare numbers."""
    tensors = write_gguf(tmp_path / "floats.gguf", "qwen3-moe", "F16")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3-moe"), dtype=torch.float32)
    reference.load_state_dict(merge_experts(tensors), strict=False)
    ids = torch.arange(5, 69)
    with start(tmp_path / "floats.gguf") as engine, torch.inference_mode():
        model = model_of(engine)
        found = model.heads["lm"](model.forward(ids, torch.arange(64), packed_layout([64]), None))
        expected = reference(ids[None]).logits[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    numbers = merge_experts(write_gguf(tmp_path / "model.gguf", "qwen3-moe", "Q4_0"))
    with start(tmp_path / "model.gguf") as engine:
        assert engine.client.models[0].stored_as == "36 of 36 matrices as gguf"
        for part in ("gate_up", "down"):
            name = f"model.layers.1.mlp.experts.{part}_proj"
            kept = read(model_of(engine).whole, name, 8)
            assert kept is not None
            assert torch.equal(kept, numbers[name])
        assert len(generate(engine, ["the cat"], max_new_tokens=4, temperature=0)[0]["output_ids"]) > 0


def test_merged_matrices_of_several_types(write_gguf: Write, tmp_path: Path) -> None:
    """As queries, keys and values have in llama.cpp's mixtures."""
    expected = write_gguf(tmp_path / "model.gguf", kind="Q4_0", values="Q8_0")
    with start(tmp_path / "model.gguf") as engine:
        assert engine.client.models[0].stored_as == "8 of 8 matrices as gguf"
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.1.self_attn.{part}.weight"
            found = read(model_of(engine).whole, name, 10_000)
            assert found is not None
            assert torch.equal(found, expected[name])


@pytest.mark.parametrize("kind", [*KEPT, "F16", "BF16", "F32"])
def test_tensors_have_the_numbers_of_the_file(write_gguf: Write, tmp_path: Path, kind: str) -> None:
    expected = write_gguf(tmp_path / "model.gguf", "llama", kind)
    found = dict(stream(str(folder_of(tmp_path / "model.gguf"))))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.to(dtype=torch.float32), expected[name].float()), name
        assert isinstance(tensor, QuantizedTensor) == (kind in KEPT and tensor.to().ndim == 2)
        if isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor.quantized().numbers(), expected[name]), name


def test_tokenizer_and_chat_template_come_from_the_file(
    write_gguf: Write, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    with start(tmp_path / "model.gguf") as engine:
        tokenizer: Any = model_of(engine).tokenizer
        assert tokenizer.encode("the cat", add_special_tokens=False) == theirs.encode(
            "the cat", add_special_tokens=False
        )
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert prompt == "<user>hi"
        assert len(generate(engine, ["the cat"], max_new_tokens=4, temperature=0)[0]["output_ids"]) > 0


def test_another_quantisation_can_be_asked_for(write_gguf: Write, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with start(tmp_path / "model.gguf", quantization="int4") as engine:
        assert engine.client.models[0].stored_as == "8 of 8 matrices as int4"


def test_rotary_factors_of_llama_3(write_gguf: Write, tmp_path: Path) -> None:
    frequencies = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = (frequencies / scaled.numpy()).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    read = transformers.AutoConfig.from_pretrained(folder_of(tmp_path / "model.gguf"))
    assert read.rope_parameters["rope_type"] == "llama3"
    write_gguf(tmp_path / "other.gguf", extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(ModelError, match=r"other\.gguf can't be served: .*aren't those of Llama 3"):
        folder_of(tmp_path / "other.gguf")


def test_a_file_that_changes_is_prepared_again(write_gguf: Write, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    first = folder_of(file)
    assert folder_of(file) == first
    os.utime(file, ns=(1, 1))
    with pytest.raises(ModelError, match="has changed or gone"):
        next(stream(str(first)))
    assert folder_of(file) != first


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_types_that_only_llama_cpp_writes(tmp_path: Path, kind: str) -> None:
    """Random blocks: numbers are those of the package but for the rounding of scales to 11 bits."""
    quantised = gguf.GGMLQuantizationType[kind]
    size, count = gguf.GGML_QUANT_SIZES[quantised]
    random, outputs = np.random.default_rng(5), 24
    blocks = random.integers(0, 256, (outputs * 2, count), dtype=np.uint8)
    for at in [208] if kind == "Q6_K" else [0, 2]:
        blocks[:, at : at + 2] = random.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    (tmp_path / "data").write_bytes(b"head" + blocks.tobytes())
    with open_regular(tmp_path / "data") as opened:
        identity = file_identity(opened)
    raw = StoredTensor(tmp_path / "data", identity, torch.uint8, torch.Size([blocks.size]), 4)
    order = random.permutation(outputs).tolist()
    tensor = QuantizedGgufTensor(raw, TensorPlace(kind, (outputs, 2 * size), 4, blocks.size, order))
    numbers = tensor.to()
    assert np.array_equal(numbers.numpy(), gguf.dequantize(blocks, quantised).reshape(outputs, -1)[order])
    weight = tensor.quantized()
    largest = numbers.abs().amax(1, keepdim=True)
    assert ((weight.numbers() - numbers).abs() <= 2e-3 * largest).all()
    rows = torch.randn(5, 2 * size)
    found, expected = QuantizedLinear(weight, torch.float32)(rows), rows @ numbers.t()
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_table_outside_the_cache_is_ignored(write_gguf: Write, tmp_path: Path) -> None:
    """It names a file to read: a checkpoint's author must not choose one."""
    write_gguf(tmp_path / "model.gguf")
    prepared = folder_of(tmp_path / "model.gguf")
    assert is_prepared(str(prepared))
    shutil.copytree(prepared, tmp_path / "elsewhere")
    assert not is_prepared(str(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match="no weights to load"):
        start(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"blk.0.attn_q.bias": np.ones(128, np.float32)},
            "no place for 1 of its tensors, the first is blk.0.attn_q.bias",
        ),
        ({"rope_factors_long.weight": np.ones(16, np.float32)}, "the first is rope_factors_long.weight"),
    ],
)
def test_tensors_without_a_place_are_refused(
    write_gguf: Write, tmp_path: Path, extra: dict[str, np.ndarray], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", extra=extra)
    with pytest.raises(ModelError, match=message):
        folder_of(tmp_path / "model.gguf")


def test_a_tensor_that_was_sent_replaces_the_file_s(write_gguf: Write, tmp_path: Path) -> None:
    """Even if it is nearly the same, as after a step of training."""
    tensors = write_gguf(tmp_path / "model.gguf")
    name = "model.layers.1.mlp.down_proj.weight"
    kept = stored.transform("gguf", stream(str(folder_of(tmp_path / "model.gguf"))))
    assert kept.pack([name], tensors[name]) is not None
    assert kept.pack([name], tensors[name] * 1.001) is None


def test_updates_take_folders(write_gguf: Write, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with start(tmp_path / "model.gguf") as engine:

        async def call() -> Any:
            return await engine.client.call("update_weights", model_path=str(tmp_path / "model.gguf"))

        answer = engine.run(call())
    assert not answer["success"]
    assert "is a GGUF file; new weights come from folders with safetensors files" in answer["message"]


def test_in_a_process_of_its_own(write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture that runs it here
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.X", null]}}')  # isn't read
    assert (folder_of(tmp_path / "model.gguf") / "tokenizer.json").is_file()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match=r"broken\.gguf can't be served: "):
        folder_of(tmp_path / "broken.gguf")


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelError, match=r"broken\.gguf can't be served"):
        start(tmp_path / "broken.gguf")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is a file; give the folder .* or a GGUF file"):
        start(tmp_path / "model.bin")
