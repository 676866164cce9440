"""Programs that evaluate and measure servers: mteb's scores, and the tokens that guidellm and aiperf count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.clients

CLIENTS = ("mteb", "guidellm", "aiperf")
SET = (
    "guidellm's `target` and aiperf's `--url`: the server's address; mteb's `OpenAIModel`: a `client` with the "
    "server's address and `/v1` as `base_url`, and the width of the vectors as `embed_dim`"
)

REQUESTS, PROMPT, OUTPUT = 6, 32, 8


def test_scores_of_mteb_are_those_of_sentence_transformers(
    mteb: Callable[..., str], vector_server: Any, vector_demo: Path
) -> None:
    printed = mteb("programs/use_mteb.py", f"{vector_server.url}/v1", str(vector_demo))
    served, local = json.loads(printed.splitlines()[-1])
    assert set(local) == {"cosine_pearson", "cosine_spearman"}
    assert served == pytest.approx(local, abs=1e-4)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(
    guidellm: Callable[..., str], server: Any, demo: Path, generated: Callable[..., Any], tmp_path: Path, route: str
) -> None:
    report = tmp_path / "report.json"
    options = {
        "--backend": f"kind=openai_http,target={server.url},request_format={route}",
        "--data": f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--profile": "kind=concurrent,streams=2",
        "--constraint": f"kind=max_requests,count={REQUESTS}",
        "--tokenizer": f"kind=huggingface_auto,model={demo}",
        "--output": f"kind=json,path={report}",
    }
    guidellm("-m", "guidellm", "run", *(part for option in options.items() for part in option), "--disable-console")
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"]
    assert len(requests["successful"]) == REQUESTS
    for request in requests["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT
        body = json.loads(request["request_args"])["body"]
        expected = generated(body["prompt"] if "prompt" in body else chat(body["messages"]), 1)
        assert request["input_metrics"]["text_tokens"] == expected["meta_info"]["prompt_tokens"]


def chat(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The messages with the texts of their parts."""
    return [{**one, "content": "".join(part["text"] for part in one["content"])} for one in messages]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_aiperf(aiperf: Callable[..., str], server: Any, tmp_path: Path, endpoint: str) -> None:
    options = {
        "--model": "default",
        "--url": server.url,
        "--endpoint-type": endpoint,
        "--tokenizer": "trunkline/demo",
        "--request-count": str(REQUESTS),
        "--concurrency": "2",
        "--synthetic-input-tokens-mean": str(PROMPT),
        "--output-tokens-mean": str(OUTPUT),
        "--extra-inputs": "ignore_eos:true",
        "--artifact-dir": str(tmp_path),
        "--ui": "none",
    }
    aiperf("-m", "aiperf", "profile", "--streaming", *(part for option in options.items() for part in option))
    lines = (tmp_path / "profile_export.jsonl").read_text().splitlines()
    assert len(lines) == REQUESTS
    for metrics in (json.loads(line)["metrics"] for line in lines):
        assert metrics["usage_completion_tokens"]["value"] == OUTPUT
        template = metrics["usage_prompt_tokens"]["value"] - metrics["input_sequence_length"]["value"]
        assert template == 0 if endpoint == "completions" else template > 0
