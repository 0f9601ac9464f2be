"""Sets of prompts and groups that may have millions of members: eight bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Set
from functools import lru_cache

import numpy as np

from pipeline.rollouts.tables import key64, one_key64

Array = np.ndarray[tuple[int], np.dtype[np.uint64]]
NO_KEYS: Array = np.zeros(0, np.uint64)
_FEW = 4096


class Keys:
    """A set of 64-bit numbers: a sorted array, and beside it the few that came since the last merge.

    One thread may add while others ask.
    """

    def __init__(self) -> None:
        self._sorted = NO_KEYS
        self._recent: set[int] = set()

    def add(self, key: int) -> None:
        if key not in self:
            self._recent.add(key)
            self._merge()

    def update(self, keys: Array) -> None:
        self._recent.update(keys[~self.has(keys)].tolist())
        self._merge()

    def _merge(self) -> None:
        # A merge each sixteenth: few enough that all of them cost as much as one sort.
        if len(self._recent) > max(_FEW, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]), kind="stable")
            self._recent = set()

    def has(self, keys: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which of the keys are members."""
        recent = self._recent  # before the array: a merge in between moves members to where they are looked for last
        found = np.fromiter((key in recent for key in keys.tolist()), bool, len(keys))
        ordered = self._sorted
        if len(ordered):
            place = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
            found |= ordered[place] == keys
        return found

    def __contains__(self, key: int) -> bool:
        return bool(self.has(np.array([key], np.uint64))[0])

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)


class PromptIds:
    """A set of prompt ids, kept as 64-bit keys: exact for ours, which are 16 hex digits; others are hashed."""

    def __init__(self) -> None:
        self._keys = Keys()

    def update(self, prompt_ids: Iterable[str]) -> None:
        self.update_keys(key64(prompt_ids))

    def update_keys(self, keys: Array) -> None:
        """The same of `tables.key64` of them."""
        self._keys.update(keys)

    def __contains__(self, prompt_id: object) -> bool:
        return isinstance(prompt_id, str) and one_key64(prompt_id) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __eq__(self, other: object) -> bool:
        """Against a plain set."""
        return isinstance(other, Set) and len(other) == len(self) and all(member in self for member in other)

    __hash__ = None  # type: ignore[assignment]


def group_keys(snapshot_id: str, round: int, prompt_ids: Iterable[str]) -> Array:
    """Keys of groups of one behaviour policy: different for different prompts where their 64-bit ids are."""
    return key64(prompt_ids) ^ np.uint64(_salt(snapshot_id, round))


def one_group_key(key: tuple[str, int, str]) -> int:
    """The same of one (snapshot_id, round, prompt_id)."""
    return one_key64(key[2]) ^ _salt(key[0], key[1])


@lru_cache(maxsize=1024)
def _salt(snapshot_id: str, round: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{snapshot_id}|{round}".encode(), digest_size=8).digest(), "big")
