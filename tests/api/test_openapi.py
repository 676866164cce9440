"""Replies of every route are what ``/openapi.json`` says: status, media type, schema, headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from safetensors.torch import load_file, save

JSON, SSE, BYTES = "application/json", "text/event-stream", "application/octet-stream"
MODELS = {"talks": "llama", "embeds": "bert", "ranks": "bert-score", "labels": "qwen2-labels", "experts": "mixtral"}
MAX_BODY = 1 << 17
ENDLESS = "/expert_distribution/stream"
OTHERS = (  # whose bodies are no JSON, or that refuse whatever is sent
    "/update_weights_from_tensor", "/update_weights_from_distributed", "/init_weights_update_group",
    "/destroy_weights_update_group", "/update_weights_from_ipc",
)  # fmt: skip
LONG = "the sea and the other there " * 300
SAMPLING = {"temperature": 0, "max_new_tokens": 3}
MESSAGES = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
RANK = {"query": "a", "documents": ["b", "c"], "model": "ranks"}

Case = tuple[dict[str, Any], dict[str, str], int]  # body, query, status


def ok(body: dict[str, Any], **query: str) -> Case:
    return body, query, 200


def bad(body: dict[str, Any], **query: str) -> Case:
    return body, query, 400


FORMATS = [ok(RANK, format=name) for name in ("sglang", "jina", "cohere", "tei")]
RERANK = [
    ok(RANK),
    ok(RANK | {"documents": [LONG], "truncate": "end"}, format="jina"),
    ok(RANK | {"documents": [LONG], "truncate": "end", "return_documents": True}, format="cohere"),
    ok({"query": "a", "texts": ["b", LONG], "truncate": True, "return_text": True, "model": "ranks"}, format="tei"),
    *FORMATS,
    bad(RANK | {"documents": []}),
    bad(RANK, format="xml"),
]
SCORE = [
    ok({"text_1": "a", "text_2": ["b", LONG], "truncate": "end", "model": "ranks"}),
    ok({"query": "a", "items": ["b"], "model": "ranks"}),
    ok({"query": "a", "items": ["b", "c"], "label_token_ids": [5, 6], "model": "talks"}),
    bad({"query": "a", "items": [], "model": "ranks"}),
]
VECTORS = [ok({"text": "a"}), ok({"text": ["a", LONG], "truncate": "end"}), bad({"text": ""}), bad({"text": 5})]
EMBED = [ok({"inputs": ["a", LONG], "truncate": True}), ok({"inputs": [5, 6]}), bad({"inputs": []})]
COHERE = {
    "texts": ["a", LONG],
    "embedding_types": ["float", "base64", "int8", "uint8", "binary", "ubinary"],
    "input_type": "search_query",
}
TOKENIZE = [
    ok({"prompt": "a"}),
    ok({"prompt": ["a", "b"]}),
    ok({"messages": MESSAGES["messages"]}),
    bad({}),
    ({"prompt": "a", "model": "x"}, {}, 404),
]
DETOKENIZE = [ok({"tokens": [5]}), ok({"tokens": [[5], []]}), bad({"tokens": [-1]})]
UPDATES = [bad({"model_path": "no/where"}), bad({"model_path": "x", "load_format": "dummy"}), bad({})]
CASES: dict[str, list[Case]] = {
    "/generate": [
        ok({"text": "a", "sampling_params": SAMPLING}),
        ok({"text": ["a", "b"], "sampling_params": SAMPLING, "return_prompt_token_ids": True}),
        bad({"text": "a", "session_params": {"id": "nobody"}}),
        bad({"input_embeds": [[0.5]], "sampling_params": SAMPLING}),
        ok({"text": ["a", "b"], "sampling_params": SAMPLING, "stream": True}),
        ok({"input_ids": [9], "sampling_params": SAMPLING, "stream": True}),
        ok({"input_ids": [9999], "stream": True}),  # an error inside a stream
        bad({"input_ids": [9999]}),
    ],
    "/v1/completions": [
        ok({"prompt": "a", "logprobs": 2, "echo": True, "max_tokens": 2}),
        ok({"prompt": [[5], [6]], "n": 2, "max_tokens": 1, "return_token_ids": True}),
        ok({"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "logprobs": 0, "echo": True}),
        ok({"prompt": [5, 6], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
        bad({"prompt": "a", "suffix": "b"}),
        bad({"prompt": []}),
        ({"prompt": "a", "model": "gpt-4o"}, {}, 404),
    ],
    "/v1/chat/completions": [
        ok(MESSAGES),
        ok(MESSAGES | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        ok(MESSAGES | {"logprobs": True, "stream": True, "return_token_ids": True}),
        ok(MESSAGES | {"n": 2, "model": "talks"}),
        ok(MESSAGES | {"n": 2, "stream": True}),
        ok(MESSAGES | {"stream": True, "stream_options": {"include_usage": True}}),
        bad(MESSAGES | {"n": 0.5}),
        (MESSAGES | {"model": "gpt-4o"}, {}, 404),
    ],
    "/v1/responses": [
        ok({"input": "a", "max_output_tokens": 2}),
        ok({"input": [{"role": "user", "content": "a"}], "max_output_tokens": 2, "model": "talks", "stream": True}),
        bad({"input": []}),
        ({"input": "a", "model": "gpt-4o"}, {}, 404),
    ],
    "/encode": VECTORS,
    "/v1/embeddings": [
        ok({"input": ["a", LONG], "truncate": "end", "model": "embeds"}),
        ok({"input": "a", "encoding_format": "base64", "model": "embeds"}),
        bad({"input": []}),
        ({"input": "a", "model": "ada"}, {}, 404),
    ],
    "/embed": EMBED,
    "/": EMBED,
    "/decode": [ok({"ids": [[5], [6]]}), ok({"ids": [5]}), bad({"ids": []})],
    "/v1/embed": [ok({"texts": ["a"]}), ok(COHERE), bad({"texts": []}), ({"texts": ["a"], "model": "x"}, {}, 404)],
    "/v2/embed": [
        ok({"inputs": [{"content": [{"type": "text", "text": "a"}]}]}),
        ok(COHERE),
        bad(COHERE | {"images": ["a"]}),
    ],
    "/v1/rerank": RERANK,
    "/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/score": SCORE,
    "/v1/score": SCORE,
    "/classify": [*VECTORS, ok({"text": [["a", "b"]], "model": "ranks"})],
    "/v1/classify": [
        ok({"input": ["a", LONG], "truncate": "end", "model": "labels"}),
        bad({"input": ""}),
        ({"input": "a", "model": "x"}, {}, 404),
    ],
    "/open_session": [ok({"capacity_of_str_len": 1}), bad({"capacity_of_str_len": 1, "timeout": 0}), bad({})],
    "/close_session": [ok({"session_id": "s"}), bad({})],
    "/tokenize": TOKENIZE,
    "/v1/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/v1/detokenize": DETOKENIZE,
    "/abort_request": [ok({"rid": "nobody"}), bad({"rid": []})],
    "/pause_generation": [ok({"mode": "retract"}), bad({"mode": "x"}), bad({}, model="nobody")],
    "/continue_generation": [ok({}), bad({}, model="nobody")],
    "/release_memory_occupation": [ok({"tags": ["kv_cache"]}), bad({"tags": ["x"]})],
    "/resume_memory_occupation": [ok({}), bad({}, model="nobody")],
    "/start_profile": [bad({"num_steps": "x"}), ok({"start_step": 1 << 40})],
    "/configure_logging": [ok({"log_requests": True}), bad({"log_level": "x"})],
    "/slow_down": [ok({"forward_sleep_time": None}), bad({"forward_sleep_time": 99})],
    "/update_weights": UPDATES,
    "/update_weights_from_disk": UPDATES,
    "/update_weight_version": [ok({"new_version": "2"}), bad({"new_version": "3"}, model="nobody")],
    "/get_weights_by_name": [
        ok({"name": "model.norm.weight"}),
        ok({"name": "model.embed_tokens.weight", "truncate_size": 2}),
        bad({"name": "x"}),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(zoo: Callable[[str], Path], live: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    dumps = tmp_path_factory.mktemp("dumps")
    arguments = ["--dtype", "float32", "--threads", "1", "--enable-metrics", "--expert-dump-dir", str(dumps)]
    arguments += ["--max-body-bytes", str(MAX_BODY)]
    for name, checkpoint in MODELS.items():
        arguments += [str(zoo(checkpoint)), "--served-model-name", name]
        if name == "talks":
            arguments += ["--task", "generation,embedding,rerank"]
    return live(*arguments)


@pytest.fixture
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def document(server: Any) -> Any:
    return httpx.get(f"{server.url}/openapi.json", timeout=60).json()


class Description:
    """An operation as the document describes it. ``seen``: statuses and media types of the checked replies."""

    def __init__(self, document: Any, method: str, path: str) -> None:
        self.document, self.method, self.path = document, method.upper(), path
        self.responses = document["paths"][path][method]["responses"]
        self.seen: set[tuple[str, str]] = set()

    def check(self, answer: httpx.Response, status: int | None = None) -> None:
        """Fails unless the reply is described, and has ``status`` if one is given."""
        where = f"{self.method} {self.path} -> {answer.status_code} {answer.text[:300]}"
        assert status in (None, answer.status_code), where
        assert str(answer.status_code) in self.responses, where
        described = self.responses[str(answer.status_code)]
        assert "X-Request-Id" in described["headers"]
        assert "x-request-id" in answer.headers
        content = described.get("content", {})
        media = answer.headers.get("content-type", "").partition(";")[0] if content else ""
        self.seen.add((str(answer.status_code), media))
        if not content:
            assert answer.content == b"", where
            return
        assert media in content, where
        schema = content[media]["schema"]
        if media == JSON:
            self._validate(schema, answer.json(), where)
        elif media == SSE:
            self._events(schema, answer.text, where)

    def _events(self, schema: Any, text: str, where: str) -> None:
        described, _ = schema["properties"]["data"]["anyOf"]
        for event in text.split("\n\n")[:-1]:
            data = event.partition("data: ")[2]  # an event may have a name before it
            self._validate(schema, {"data": data}, where)
            if data != "[DONE]":
                self._validate(described["contentSchema"], json.loads(data), where)

    def _validate(self, schema: Any, value: Any, where: str) -> None:
        errors = list(jsonschema_rs.iter_errors(schema | {"components": self.document["components"]}, value))
        assert not errors, (where, errors[0].message)


def operations(document: Any, *, with_body: bool) -> list[tuple[str, str]]:
    return [
        (method, path)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if ("requestBody" in operation) is with_body and path not in (ENDLESS, *OTHERS)
    ]


@pytest.mark.field
def test_replies_to_bodies_are_described(http: httpx.Client, document: Any) -> None:
    found = operations(document, with_body=True)
    assert {path for _, path in found} == CASES.keys()
    for method, path in found:
        description = Description(document, method, path)
        for body, query, status in CASES[path]:
            answer = http.request(method, path, json=body, params=query)
            description.check(answer, status)
        optional = not document["paths"][path][method]["requestBody"]["required"]
        none = {"/start_profile": 400}.get(path, 200)  # it is running by now
        for content, status in (
            (b"{", 400),
            (b"", none if optional else 400),
            (b'{"a": ' + b" " * MAX_BODY + b"1}", 413),
        ):
            answer = http.request(method, path, content=content, headers={"content-type": JSON})
            description.check(answer, status)
        described = {("200", media) for media in description.responses["200"].get("content", {"": 0})}
        if path not in ("/update_weights", "/update_weights_from_disk"):
            assert described <= description.seen, "a described reply was never given"
        if (path, method) == ("/start_profile", "get"):
            http.post("/stop_profile")
    assert http.post("/continue_generation").status_code == 200
    assert "x-truncated-inputs" in http.post("/embed", json=CASES["/embed"][0][0]).headers
    assert "X-Truncated-Inputs" in document["paths"]["/embed"]["post"]["responses"]["200"]["headers"]


@pytest.mark.field
def test_replies_to_tensors_are_described(http: httpx.Client, document: Any, zoo: Callable[[str], Path]) -> None:
    description = Description(document, "post", "/update_weights_from_tensor")
    assert document["paths"]["/update_weights_from_tensor"]["post"]["requestBody"]["content"].keys() == {BYTES}
    norm = {"model.norm.weight": load_file(zoo("llama") / "model.safetensors")["model.norm.weight"]}
    description.check(http.post("/update_weights_from_tensor", json={}), 400)
    for content, query, status in ((save(norm), {}, 200), (b"x", {}, 400), (b"", {"weight_version": "x" * 300}, 400)):
        answer = http.post(
            "/update_weights_from_tensor", content=content, params=query, headers={"content-type": BYTES}
        )
        description.check(answer, status)
    for path in OTHERS[1:]:
        description = Description(document, "post", path)
        description.check(http.post(path, json={}), 400)


@pytest.mark.field
def test_an_update_that_succeeds_is_described(http: httpx.Client, document: Any, zoo: Callable[[str], Path]) -> None:
    for path in ("/update_weights", "/update_weights_from_disk"):
        description = Description(document, "post", path)
        body = {"model_path": str(zoo("bert")), "weight_version": "3"}
        description.check(http.post(path, json=body, params={"model": "embeds"}), 200)


@pytest.mark.field
def test_replies_without_bodies_are_described(http: httpx.Client, document: Any) -> None:
    for method, path in operations(document, with_body=False):
        description = Description(document, method, path)
        about = {"model": "experts"} if "expert" in path else {}
        target = path.replace("{name}", "generation" if path.startswith("/plugins") else "talks")
        if path == "/stop_profile":
            http.post("/start_profile")
        description.check(http.request(method, target, params=about), 200)
        if any(parameter["name"] == "format" for parameter in document["paths"][path][method].get("parameters", ())):
            for name in ("json", "prometheus") if path == "/v1/loads" else ("json",):
                description.check(http.request(method, target, params=about | {"format": name}), 200)
            description.check(http.request(method, target, params=about | {"format": "xml"}), 400)
        if any(parameter["name"] == "model" for parameter in document["paths"][path][method].get("parameters", ())):
            description.check(http.request(method, target, params={"model": "nobody"}), 400)
        described = {("200", media) for media in description.responses["200"].get("content", {"": 0})}
        assert described <= description.seen, (path, "a described reply was never given")
    Description(document, "get", "/v1/models/{name}").check(http.get("/v1/models/nobody"), 404)
    Description(document, "post", "/plugins/{name}/enable").check(http.post("/plugins/nobody/enable"), 404)
    Description(document, "get", "/flush_cache").check(http.get("/flush_cache?timeout=-1"), 400)


@pytest.mark.field
def test_the_endless_stream_is_described(http: httpx.Client, document: Any) -> None:
    description = Description(document, "get", ENDLESS)
    description.check(http.get(ENDLESS), 400)
    with http.stream("GET", ENDLESS, params={"model": "experts"}) as answer:
        event = next(answer.iter_lines())
    described = description.responses["200"]["content"]
    assert answer.headers["content-type"].startswith(*described)
    description._events(described[SSE]["schema"], f"{event}\n\n", ENDLESS)


@pytest.mark.field
def test_a_page_from_elsewhere_gets_a_described_403(http: httpx.Client, document: Any) -> None:
    admin = [
        (method, path)
        for method, path in [*operations(document, with_body=True), *operations(document, with_body=False)]
        if "403" in document["paths"][path][method]["responses"]
    ]
    assert {"/flush_cache", "/update_weights", "/expert_distribution"} <= {path for _, path in admin}
    for method, path in admin:
        answer = http.request(method, path, headers={"origin": "http://elsewhere.example"})
        Description(document, method, path).check(answer, 403)
