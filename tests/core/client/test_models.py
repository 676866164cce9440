"""Which model a request means."""

from __future__ import annotations

import pytest

from trunkline.core.client.models import choose_model, named_model, named_or_primary
from trunkline.core.errors import RequestError
from trunkline.core.types import ModelInfo, ServedModel


def model(name: str, *tasks: str, refused: str = "", aliases: tuple[str, ...] = ()) -> ServedModel:
    """A served model; ``refused`` is why it doesn't rank."""
    info = ModelInfo(
        path="/", architecture="X", model_type="x", context_length=8, vocab_size=8, hidden_size=8, causal=True
    )
    return ServedModel(
        name=name, aliases=aliases, model_path=name, tokenizer_path=name, info=info, tasks=dict.fromkeys(tasks, False),
        refused={"rank": refused} if refused else {}, max_total_tokens=8, max_running_requests=1, dtype="float32",
        attention_backend="cpu",
    )  # fmt: skip


FLEET = [model("a", "talk"), model("b", "talk", "embed", aliases=("bee",)), model("c", "rank")]


@pytest.mark.field
@pytest.mark.parametrize(
    ("task", "name", "expected"),
    [
        *((task, name, first) for task, first in (("talk", "a"), ("embed", "b"), ("rank", "c"))
          for name in (None, "", "default", "unknown", "dummy")),
        ("talk", "b", "b"),
        ("talk", "bee", "b"),
        ("embed", "text-embedding-3-small", "b"),
        ("rank", "rerank-v3.5", "c"),
    ],
)  # fmt: skip
def test_a_request_finds_its_model(task: str, name: str | None, expected: str) -> None:
    assert choose_model(FLEET, task, name).name == expected


@pytest.mark.field
def test_an_unknown_name_is_refused_where_several_models_serve_the_task() -> None:
    with pytest.raises(RequestError, match="'gpt-4o' does not exist; there are: a, b") as caught:
        choose_model(FLEET, "talk", "gpt-4o")
    assert (caught.value.code, caught.value.param, caught.value.status) == ("model_not_found", "model", 400)
    assert choose_model(FLEET[:1], "talk", "gpt-4o").name == "a"


@pytest.mark.field
def test_a_model_may_be_called_default() -> None:
    models = [*FLEET, model("default", "talk"), model("x", "talk", aliases=("unknown",))]
    assert choose_model(models, "talk", "default").name == "default"
    assert choose_model(models, "talk", "unknown").name == "x"
    assert choose_model(models, "talk").name == "a"


@pytest.mark.field
def test_a_task_that_no_model_serves_is_blamed_on_none_of_them() -> None:
    models = [model("a", "talk", refused="Add --task rank."), model("b", "embed")]
    for name in (None, "default", "nope"):
        with pytest.raises(RequestError) as caught:
            choose_model(models, "rank", name)
        assert caught.value.message == (
            "No loaded model serves rank. a: Add --task rank. b: The model 'b' does not serve rank; it serves: embed."
        )
        assert caught.value.status == 400
    with pytest.raises(RequestError, match=r"^Add --task rank\.$"):
        choose_model(models, "rank", "a")
    with pytest.raises(RequestError, match=r"^Add --task rank\.$"):
        choose_model(models[:1], "rank")


@pytest.mark.field
def test_a_call_about_a_model_means_the_primary_unless_it_names_another() -> None:
    for name in (None, "", "default", "unknown", "dummy"):
        assert named_or_primary(FLEET, name).name == "a"
        assert named_model(FLEET, name) is None
    assert named_or_primary(FLEET, "bee").name == "b"
    with pytest.raises(RequestError, match="there are: a, b, c"):
        named_or_primary(FLEET, "d")
    assert named_or_primary(FLEET[1:2], "d").name == "b"
