"""Folders of GPTQ and AWQ are served with their integers; their numbers are those of the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.errors import ModelError
from trunkline.core.model.attention import packed_layout
from trunkline.core.model.fusion.origins import read
from trunkline.core.model.loaded import LoadedModel
from trunkline.core.model.sources.quantized.tensors import FolderTensor, format_of, stream
from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.core.model.transforms import stored
from trunkline.plugins.generation.offline import generate

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Tensors]
KINDS = ["gptq", "gptq-8", "gptq-asymmetric", "gptq-ordered", "gptq-v2", "awq"]


def start(folder: Path, **options: Any) -> Engine:
    return Engine(str(folder), dtype="float32", threads=1, **options)


def model_of(engine: Engine) -> LoadedModel:
    transport: Any = engine.client.transport
    model: LoadedModel = transport.loop.lanes[0].model
    return model


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    form = format_of(str(folder))
    assert form is not None
    return dict(stream(str(folder), form))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_have_the_numbers_of_the_format(write_quantised: Write, tmp_path: Path, kind: str) -> None:
    expected = write_quantised(tmp_path / "model", kind=kind)
    found = tensors_of(tmp_path / "model")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.to(dtype=torch.float32), expected[name].float()), name
        if isinstance(tensor, FolderTensor):
            # Minima are rounded to 11 bits, which is the only difference.
            largest = expected[name].abs().max()
            torch.testing.assert_close(tensor.quantized().numbers(), expected[name], rtol=0, atol=2e-3 * float(largest))


@pytest.mark.parametrize(("name", "kind"), [("llama", kind) for kind in KINDS] + [("qwen2", "gptq"), ("gemma3", "awq")])
def test_logits_are_those_of_the_dequantised_weights(
    write_quantised: Write, zoo: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    tensors = write_quantised(tmp_path / "model", name, kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(zoo(name), dtype=torch.float32)
    reference.load_state_dict(tensors, strict=False)
    ids = torch.arange(5, 69)
    with start(tmp_path / "model") as engine, torch.inference_mode():
        model = model_of(engine)
        hidden = model.forward(ids, torch.arange(64), packed_layout([64]), None)
        found, expected = model.heads["lm"](hidden), reference(ids[None]).logits[0]
        stored_as = engine.client.models[0].stored_as
        assert len(generate(engine, ["the cat"], max_new_tokens=4, temperature=0)[0]["output_ids"]) > 0
    assert float((found - expected).norm() / expected.norm()) < 0.05  # rows are rounded to int8
    assert stored_as == f"8 of 8 matrices as {kind.partition('-')[0]}"


def test_weights_of_another_folder(write_quantised: Write, tmp_path: Path) -> None:
    """An update takes its integers; by name, tensors have the numbers of the format."""
    write_quantised(tmp_path / "model")
    expected = write_quantised(tmp_path / "next", kind="gptq-asymmetric")
    with start(tmp_path / "model") as engine:

        async def call() -> Any:
            return await engine.client.call("update_weights", model_path=str(tmp_path / "next"))

        assert engine.run(call())["success"]
        model = model_of(engine)
        assert model.stored_as == "8 of 8 matrices as gptq"
        name = "model.layers.1.mlp.down_proj.weight"
        found = read(model.whole, name, 10_000)
    assert found is not None
    torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3 * float(expected[name].abs().max()))


def test_groups_that_kernels_dont_have(
    write_quantised: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantised(tmp_path / "model", kind="gptq-16")
    with start(tmp_path / "model") as engine:
        assert model_of(engine).stored_as == ""
        assert len(generate(engine, ["the cat"], max_new_tokens=2, temperature=0)[0]["output_ids"]) > 0
    (reason,) = (line for line in caplog.messages if "dequantised from gptq" in line)
    assert "its groups have 16 inputs, not one multiple of 32" in reason
    assert any("14 of the checkpoint's 14 quantised matrices are dequantised" in line for line in caplog.messages)


def test_merged_matrices_with_different_orders(
    write_quantised: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantised(tmp_path / "model", kind="gptq-unlike")
    with start(tmp_path / "model") as engine:
        # Queries have more outputs than keys and values; gates have as many as the matrices that they are merged with.
        assert model_of(engine).stored_as == "6 of 8 matrices as gptq"
    assert any("their inputs have different orders" in line for line in caplog.messages)
    assert any("6 of the checkpoint's 14 quantised matrices are dequantised" in line for line in caplog.messages)


def test_experts_keep_their_integers(write_quantised: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write_quantised(tmp_path / "model", "qwen3-moe")
    with start(tmp_path / "model") as engine:
        assert model_of(engine).stored_as == "20 of 36 matrices as gptq"  # the others' inputs aren't a multiple of 32
        found = read(model_of(engine).whole, "model.layers.1.mlp.experts.gate_up_proj", 8)
        assert len(generate(engine, ["the cat"], max_new_tokens=2, temperature=0)[0]["output_ids"]) > 0
    assert found is not None
    for expert, numbers in enumerate(found):
        parts = [expected[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        torch.testing.assert_close(numbers, torch.cat(parts), rtol=0, atol=1e-6)
    (line,) = (line for line in caplog.messages if "quantised matrices are dequantised" in line)
    assert line.endswith("2 of the checkpoint's 42 quantised matrices are dequantised, the first is "
                         "model.layers.0.mlp.gate.weight")  # fmt: skip


def test_names_without_the_prefix_of_the_base_model(write_quantised: Write, tmp_path: Path) -> None:
    write_quantised(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name.removeprefix("model."): one for name, one in load_file(file).items()}, file)
    with start(tmp_path / "model") as engine:
        assert model_of(engine).stored_as == "8 of 8 matrices as gptq"


def test_without_the_group_of_each_input(write_quantised: Write, tmp_path: Path) -> None:
    expected = write_quantised(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if not name.endswith("g_idx")}, file)
    for name, tensor in tensors_of(tmp_path / "model").items():
        assert torch.equal(tensor.to(dtype=torch.float32), expected[name].float())


@pytest.mark.parametrize(
    ("kind", "file", "renamed"),
    [
        ("gptq", "quantize_config.json", {}),
        ("awq", "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
def test_described_in_a_file_of_its_own(
    write_quantised: Write, tmp_path: Path, kind: str, file: str, renamed: dict[str, str]
) -> None:
    """As early releases of AutoGPTQ and AutoAWQ write it: without a method, and nothing in config.json."""
    write_quantised(tmp_path / "new", kind=kind)
    expected = write_quantised(tmp_path / "old", kind=kind)
    path = tmp_path / "old/config.json"
    config = json.loads(path.read_text())
    described = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks 14 of the tensors"):
        start(tmp_path / "old")
    del described["quant_method"]
    described = {renamed.get(key, key): value for key, value in described.items()}
    (tmp_path / "old" / file).write_text(json.dumps(described))
    found = tensors_of(tmp_path / "old")
    assert found.keys() == expected.keys()
    for name, tensor in tensors_of(tmp_path / "new").items():
        assert torch.equal(found[name].to(), tensor.to())
    (tmp_path / "old" / file).write_text(json.dumps(described | {"w_bit": "four", "bits": "four"}))
    with pytest.raises(ModelError, match=rf"{file} can't be read: .*bits"):
        start(tmp_path / "old")
    (tmp_path / "old" / file).write_text('{"unrelated": 1}')
    assert format_of(str(tmp_path / "old")) is None
    (tmp_path / "old" / file).write_text("[]")
    with pytest.raises(ModelError, match=rf"{file} must hold a JSON object"):
        start(tmp_path / "old")


def test_tensors_that_a_client_sends_are_plain(write_quantised: Write, tmp_path: Path) -> None:
    tensors = write_quantised(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    kept = stored.transform("gptq", tensors_of(tmp_path / "model").items())
    assert kept.pack([name], tensors[name]) is not None
    assert kept.pack([name], tensors[name] * 1.001) is None


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"enable_deterministic_inference": True}])
def test_with_other_options(write_quantised: Write, tmp_path: Path, options: dict[str, Any]) -> None:
    write_quantised(tmp_path / "model", kind="gptq-ordered")
    with start(tmp_path / "model", **options) as engine:
        kind = options.get("quantization", "gptq")
        assert model_of(engine).stored_as == f"8 of 8 matrices as {kind}"


def test_scales_of_an_activation_are_refused(write_quantised: Write, tmp_path: Path) -> None:
    """AutoAWQ writes them for some architectures, whose activation must be divided by them."""
    write_quantised(tmp_path / "model", kind="awq")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.mlp.act.scales": torch.ones(192)}, file)
    with pytest.raises(ModelError, match=r"mlp\.act\.scales has no quantised weight beside it"):
        start(tmp_path / "model")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qzeros", None, r"lacks model\.layers\.0\.mlp\.down_proj\.qzeros"),
        ("scales", None, "lacks .*scales"),
        ("scales", torch.ones(3, 5), r"scales is \[3, 5\], expected is"),
        ("scales", torch.ones(5), r"must be a matrix, not \[5\]"),
        ("scales", torch.ones(6, 128, dtype=torch.int32), "scales is stored as int32"),
        ("qweight", torch.zeros(0, 64, dtype=torch.int32), r"must be a matrix, not \[0, 64\]"),
        ("qweight", torch.zeros(24, 128, dtype=torch.int64), "qweight is stored as int64"),
        ("qzeros", torch.zeros(6, 12, dtype=torch.int32), "is stored with 3 bits; 4 and 8"),
        ("g_idx", torch.full((192,), 99, dtype=torch.int32), "down_proj have groups from 99 to 99, not of 6"),
        ("g_idx", torch.full((192,), -1, dtype=torch.int32), "down_proj have groups from -1 to -1, not of 6"),
        ("g_idx", torch.zeros(5, dtype=torch.int32), r"g_idx is \[5\], expected is \[192\]"),
        ("g_idx", torch.zeros(192, dtype=torch.int64), "g_idx is stored as int64"),
    ],
)
def test_damaged_layers_are_refused(
    write_quantised: Write, tmp_path: Path, part: str, value: torch.Tensor | None, message: str
) -> None:
    write_quantised(tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", f"model.layers.0.mlp.down_proj.{part}"
    tensors = load_file(file)
    assert tensors.pop(name) is not None
    save_file(tensors if value is None else {**tensors, name: value}, file)
    with pytest.raises(ModelError, match=message):
        start(tmp_path / "model")
