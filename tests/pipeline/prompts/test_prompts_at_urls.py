"""Prompt files at URLs."""

from __future__ import annotations

import pytest

from pipeline.errors import RequestError
from pipeline.prompts.fetch import fetch_prompts
from pipeline.storage import objects


def test_prompts_are_brought_anew_when_they_changed(bucket: str) -> None:
    place = objects.Objects(bucket)
    place.write("some.jsonl", b"first")
    assert fetch_prompts(f"{bucket}/some.jsonl").read_bytes() == b"first"
    place.write("some.jsonl", b"second")
    path = fetch_prompts(f"{bucket}/some.jsonl")
    assert path.name == "some.jsonl" and path.read_bytes() == b"second"
    with pytest.raises(RequestError, match=f"no prompt file {bucket}/none.jsonl"):
        fetch_prompts(f"{bucket}/none.jsonl")
    place.delete(["some.jsonl"])
    with pytest.raises(RequestError, match=f"no prompt file {bucket}/some.jsonl"):
        fetch_prompts(f"{bucket}/some.jsonl")
