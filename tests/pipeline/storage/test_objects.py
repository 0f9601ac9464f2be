"""Files in an object store, one by one."""

from __future__ import annotations

import pytest

from pipeline.storage.open import place_of
from pipeline.storage.places import Overtaken


def test_a_condition_is_held_to_on_s3_and_elsewhere(bucket: str) -> None:
    for url in (bucket, "memory://bucket/conditions"):
        place = place_of(url)
        first = place.replace("file", b"1", None)
        with pytest.raises(Overtaken):
            place.replace("file", b"2", None)
        second = place.replace("file", b"2", first)
        with pytest.raises(Overtaken):
            place.replace("file", b"3", first)
        assert place.read_tagged("file") == (b"2", second)
        place.delete(["file", "never there"])
        assert place.names() == []
