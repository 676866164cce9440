"""What is counted: every token that was computed for a request, once, as transformers' routers chose."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trunkline.core import Engine
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.offline import generate
from trunkline.plugins.generation.schemas import GenerationParams
from trunkline.plugins.generation.stage import GenerationStage
from trunkline.plugins.moe_stats import offline

MIXTURES = ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "llama4"]
PROMPTS = [[11, 7, 301, 44, 5, 90, 17, 256, 33, 8, 121], [400, 3, 77, 77, 12]]
GREEDY = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}


def counts_of(report: dict[str, Any]) -> dict[int, list[int]]:
    return {layer["layer"]: layer["counts"] for layer in report["layers"]}


def computed(engine: Engine, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Generate; the tokens that went through the model, which is all but the last."""
    records = generate(engine, prompts, **{**GREEDY, **options})
    return [[*prompt, *record["output_ids"][:-1]] for prompt, record in zip(prompts, records, strict=True)]


def counts_by_transformers(path: Path, sequences: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Layer -> counts, from the routers of transformers' own classes."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    found: dict[int, torch.Tensor] = {}

    def note(layer: int, output: Any) -> None:
        chosen = output[2].flatten() if len(output) == 3 else output[0].nonzero()[:, 1]
        found[layer] = found.get(layer, 0) + torch.bincount(chosen, minlength=8)

    for name, module in whole.named_modules():
        if "Router" in type(module).__name__:
            layer = int(name.split("layers.")[1].split(".")[0])
            module.register_forward_hook(lambda _module, _given, output, layer=layer: note(layer, output))
    with torch.inference_mode():
        for sequence in sequences:
            whole(torch.tensor([sequence]), use_cache=False)
    return {layer: counts.tolist() for layer, counts in found.items()}


@pytest.mark.parametrize("name", MIXTURES)
def test_counts_are_those_of_transformers(
    engine_of: Callable[..., Engine], zoo: Callable[[str], Path], name: str
) -> None:
    """Prompts in chunks, decoding, two requests in one batch."""
    engine = engine_of(name, chunked_prefill_size=4)
    offline.start(engine)
    sequences = computed(engine, PROMPTS)
    report = offline.look(engine)
    expected = counts_by_transformers(zoo(name), sequences)
    assert expected
    assert counts_of(report) == expected
    assert report["tokens"] == sum(map(len, sequences))
    assert {layer["selections"] for layer in report["layers"]} == {report["tokens"] * report["top_k"]}
    assert report["passes"] > 7  # 16 prompt tokens in chunks of 4, then 4 decode passes


def test_cached_prefixes_are_not_computed_and_not_counted(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral")
    offline.start(engine)
    computed(engine, PROMPTS[:1], max_new_tokens=1)
    assert offline.look(engine)["tokens"] == len(PROMPTS[0])
    computed(engine, PROMPTS[:1], max_new_tokens=1)
    assert offline.look(engine)["tokens"] == len(PROMPTS[0]) + 1


def test_nothing_counts_before_start_or_after_stop(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral")
    computed(engine, PROMPTS)
    assert (offline.look(engine)["tokens"], offline.look(engine)["recording"]) == (0, False)
    offline.start(engine)
    computed(engine, [[5, 6, 7]], max_new_tokens=1)
    assert offline.stop(engine)["tokens"] == 3
    computed(engine, [[9, 9, 9, 9]], max_new_tokens=1)
    assert (offline.look(engine)["tokens"], offline.look(engine)["recording"]) == (3, False)


def test_recording_from_the_start_leaves_the_warm_up_out(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral", enable_expert_distribution_metrics=True)
    report = offline.look(engine)
    assert (report["recording"], report["tokens"], report["passes"]) == (True, 0, 0)
    computed(engine, [[5, 6, 7]], max_new_tokens=1)
    assert offline.look(engine)["tokens"] == 3


def test_probes_do_not_count_alone_or_beside_requests(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("mixtral")
    offline.start(engine)
    engine.call("probe")
    report = offline.look(engine)
    assert (report["tokens"], report["passes"]) == (0, 0)
    [lane] = engine.client.transport.loop.lanes
    together = []
    plan = lane.scheduler.plan

    def watched(**options: Any) -> Any:
        batch = plan(**options)
        if batch is not None:
            together.append({row.request.key < 0 for row in batch.rows})
        return batch

    lane.scheduler.plan = watched  # type: ignore[method-assign]
    params = {**GREEDY, "max_new_tokens": 200}
    tokens: list[list[int]] = []
    thread = threading.Thread(target=lambda: tokens.extend(computed(engine, PROMPTS[:1], **params)))
    thread.start()
    while thread.is_alive():
        engine.call("probe")
    thread.join()
    assert {True, False} in together
    report = offline.look(engine)
    assert report["tokens"] == len(tokens[0])
    assert {layer["selections"] for layer in report["layers"]} == {2 * len(tokens[0])}


def test_models_of_one_engine_are_kept_apart(engine_of: Callable[..., Engine], zoo: Callable[[str], Path]) -> None:
    engine = engine_of("mixtral", "qwen3-moe", "llama")
    first, second, dense = (model.name for model in engine.models)
    offline.start(engine)
    offline.start(engine, second)
    ours = computed(engine, PROMPTS, model=first)
    theirs = computed(engine, PROMPTS[:1], model=second)
    computed(engine, PROMPTS, model=dense)
    assert counts_of(offline.look(engine)) == counts_by_transformers(zoo("mixtral"), ours)
    assert counts_of(offline.look(engine, second)) == counts_by_transformers(zoo("qwen3-moe"), theirs)
    offline.dump(engine, second)
    assert offline.look(engine)["tokens"] == sum(map(len, ours))
    assert offline.look(engine, second)["tokens"] == 0


def test_a_dense_model_is_refused(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of("llama")
    for call in (offline.start, offline.stop, offline.dump, offline.look):
        with pytest.raises(RequestError, match="is not a MoE model") as caught:
            call(engine)
        assert caught.value.status == 400


@pytest.mark.parametrize("method", ["launch", "collect"])
def test_what_is_run_again_after_a_failure_counts_once(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    engine = engine_of("mixtral")
    offline.start(engine)
    original = getattr(GenerationStage, method)
    failures = iter([True])

    def once(*arguments: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("seeded")
        return original(*arguments)

    monkeypatch.setattr(GenerationStage, method, once)
    [sequence] = computed(engine, PROMPTS[:1])
    assert offline.look(engine)["tokens"] == len(sequence)
    assert next(failures, None) is None, "nothing failed"


def test_other_tasks_count_too(engine_of: Callable[..., Engine]) -> None:
    from trunkline.plugins.reward.offline import classify

    engine = engine_of("mixtral-score")
    offline.start(engine)
    classify(engine, [[5, 6, 7, 8]])
    assert offline.look(engine)["tokens"] == 4


def test_a_record_outlives_an_update_of_the_weights(
    engine_of: Callable[..., Engine], zoo: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    shutil.copytree(zoo("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.flip(0) if ".gate." in name else tensor for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    engine = engine_of("mixtral")
    prompt, params = list(range(10, 30)), GenerationParams(max_new_tokens=1, temperature=0.0)
    seen = []
    engine.call("experts_start")
    for _ in range(2):
        engine.submit("generation", prompt, params).result(60)
        seen.append(np.array(engine.call("experts_look")["counts"]))
        assert engine.call("update_weights", model_path=str(folder))["success"]
    assert engine.call("experts_look")["model"] == str(folder)
    first, second = seen[0], seen[1] - seen[0]
    assert first.sum(1).tolist() == second.sum(1).tolist() == [40, 40]
    assert (first != second).any(), "the routers of the new weights are others"


def test_another_number_of_choices_begins_the_record_anew(
    engine_of: Callable[..., Engine], zoo: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "new"
    shutil.copytree(zoo("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    engine = engine_of("mixtral")
    offline.start(engine)
    generate(engine, PROMPTS, **GREEDY)
    assert offline.look(engine)["top_k"] == 2
    assert engine.call("update_weights", model_path=str(folder))["success"]
    generate(engine, [[5, 6, 7]], **{**GREEDY, "max_new_tokens": 1})
    seen = offline.look(engine)
    assert (seen["top_k"], seen["tokens"]) == (1, 3)
    assert [sum(layer["counts"]) for layer in seen["layers"]] == [3, 3]
    assert "what was recorded is dropped" in caplog.text
