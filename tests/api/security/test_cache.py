"""What is cached for one client tells another nothing, if they ask for that: R-11."""

from __future__ import annotations

import httpx


def test_a_salt_keeps_prefixes_apart(http: httpx.Client) -> None:
    def cached(salt: str | None) -> int:
        body = {"input_ids": list(range(20, 60)), "sampling_params": {"max_new_tokens": 1}, "cache_salt": salt}
        answer = http.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["meta_info"]["cached_tokens"])

    assert http.post("/flush_cache?timeout=20").status_code == 200
    assert [cached("ours"), cached("ours"), cached("theirs"), cached(None), cached("theirs")] == [0, 39, 0, 0, 39]
