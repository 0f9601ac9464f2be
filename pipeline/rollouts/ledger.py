"""The manifest in the hands of its one driver: what exists, what may be written, and what many writers have recorded.

    folder/
      manifest.json                        what exists; the driver alone writes it
      part-<epoch>-<writer>-<n>.parquet    shards of writers in other processes (see `shards`)
      commits/<epoch>-<writer>-<n>.json    "this shard is whole": from the writer to the driver, which deletes it
      writers/epoch.json                   which driver the writers work for; a new driver counts it up

Nothing but the manifest says what exists. A record is a proposal: the driver lists its shard once, without groups
that it has from elsewhere, and a record whose shard is gone is dropped. So whatever a writer of an earlier driver
still does, no group is there twice, and at worst some are made again.

The manifest is written whole, and so seldom that writing it takes at most a twentieth of the time: its cost stays
linear in the shards.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.groups import GROUP_KEY, group_starts
from pipeline.rollouts.keys import NO_KEYS, Array, Keys, PromptIds, group_keys
from pipeline.rollouts.manifest import (
    MANIFEST,
    Manifest,
    Part,
    Provenance,
    Shard,
    differences,
    identity,
    parse_manifest,
)
from pipeline.rollouts.tables import key64
from pipeline.storage import durable
from pipeline.storage.places import Overtaken, Place

COMMITS, WRITERS, EPOCH = "commits", "writers", "writers/epoch.json"
SHARE = 0.05
"""Of the time that passes, what the manifest's upkeep may take."""
RECORDS_AT_ONCE = 256
"""Records that one manifest takes in, so that memory does not grow with what has gathered."""
LONGEST_PAUSE_S = 60.0
"""An upkeep that took longer than three seconds (a store that did not answer) is not put off for longer than this."""

_OURS = re.compile(r"part-\d{5,}\.parquet")
"""Shards that the driver wrote itself."""
_EPOCH_OF = re.compile(r"(?:^|/|-)(?:part-)?(\d{6})-")
"""Of a shard's or a record's name, also while it is being written."""


class Epoch(Part):
    """Which driver writers work for. Written by the driver; read by each writer before it records a shard."""

    number: int
    identity: str
    """Of the dataset's settings (see `manifest.identity`): a writer of others is refused."""


class Record(Part):
    """A shard that is whole. Written once by its writer, read and deleted by the driver."""

    epoch: int
    identity: str
    shard: Shard
    prompt_ids: list[str]
    """Of the shard's groups."""


class Pace:
    """Keeps something that costs time to a share of the time that passes."""

    def __init__(self, share: float = SHARE) -> None:
        self._rest = 1 / share - 1
        self._due = 0.0
        self.spent = 0.0
        """Seconds, altogether."""

    def wait(self) -> float:
        """Seconds until it may happen again; zero: now."""
        return max(0.0, self._due - time.monotonic())

    @contextmanager
    def spending(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.spent += ended - began
            self._due = ended + min((ended - began) * self._rest, LONGEST_PAUSE_S)


@dataclass(frozen=True, slots=True)
class _Pending:
    """What the next manifest settles."""

    shard: Shard | None
    """To be listed; null where all its groups are listed from elsewhere."""
    prompt_ids: list[str]
    done: list[str]
    """Files that are of no use once the manifest is written. Never deleted earlier: a driver that was overtaken
    in between would delete what the next one lists."""


Rewrite = Callable[[str, str, set[str]], Shard]
"""(file, name, prompt_ids) to a new shard `name`: the groups of `file` without those of these prompts."""


class Ledger:
    """Opens a folder's dataset, or begins one. The caller holds the place's lock.

    `shared` admits writers in other processes. Raises RequestError where a dataset of other settings is there.
    """

    manifest: Manifest
    """As it was last written."""
    committed: PromptIds
    """prompt_ids whose whole group is in the manifest."""
    taken: Keys
    """Keys of the groups that are in the manifest or on the way into it."""

    def __init__(
        self, place: Place, provenance: Provenance, samples: int | None, shared: bool, rewrite: Rewrite
    ) -> None:
        self._place, self._provenance, self._samples, self._rewrite = place, provenance, samples, rewrite
        self._identity = identity(provenance, samples)
        self.committed, self.taken, self.pace = PromptIds(), Keys(), Pace()
        self._pending: list[_Pending] = []
        self._tag: str | None = None
        self._epoch: int | None = None
        self._refuse(self._read()[0])
        self.shared = shared or not place.exclusive or bool(place.sizes([EPOCH]))
        if self.shared:
            self._epoch = self._begin_epoch()
        self.manifest = self._take_over()
        self._files = {shard.file for shard in self.manifest.shards}
        self._number = 1 + max((int(name[5:-8]) for name in self._files if _OURS.fullmatch(name)), default=-1)
        self._remember()
        if self._epoch is not None:
            for _ in self._adoptions():
                pass
        self._sweep()

    def _read(self) -> tuple[Manifest | None, str | None]:
        try:
            data, tag = self._place.read_tagged(MANIFEST)
        except FileNotFoundError:
            return None, None
        return parse_manifest(data, self._place.said(MANIFEST)), tag

    def _refuse(self, manifest: Manifest | None) -> None:
        where = self._place.said()
        if manifest is None:
            if any(_is_shard(name) for name in self._place.names()):
                raise RequestError(f"{where}: holds Parquet files and no {MANIFEST}; choose another folder")
            return
        found = differences(manifest, self._provenance, self._samples)
        if found:
            raise RequestError(
                f"{where}: holds a dataset of other settings ({'; '.join(found)}); "
                "choose another folder, or the settings it was begun with"
            )

    def _begin_epoch(self) -> int:
        """From here on writers of an earlier driver are refused when they ask, which they do before each record."""
        self._place.prepare(COMMITS, WRITERS)
        while True:
            try:
                data, tag = self._place.read_tagged(EPOCH)
                number = 1 + Epoch.model_validate_json(data).number
            except FileNotFoundError:
                number, tag = 1, None
            epoch = Epoch(number=number, identity=self._identity)
            # Another driver that starts at this moment takes another number.
            with suppress(Overtaken):
                self._place.replace(EPOCH, epoch.model_dump_json().encode(), tag)
                return number

    def _take_over(self) -> Manifest:
        """The manifest to go on from: the one that is there, or a new and empty one.

        Where no lock keeps an earlier driver out it is written again, so that the other's next write fails.
        """
        while True:
            found, tag = self._read()
            if found is not None and self._place.exclusive:
                return found
            manifest = found or Manifest(provenance=self._provenance, samples=self._samples).sealed()
            with suppress(Overtaken):
                self._tag = self._place.replace(MANIFEST, self._encoded(manifest), tag)
                return manifest

    def _encoded(self, manifest: Manifest) -> bytes:
        """Blanks at the end tell the epochs' manifests apart: a store compares contents, and readers don't see them."""
        return manifest.encoded() + b" " * (0 if self._place.exclusive else self._epoch or 0)

    def _remember(self) -> None:
        """Takes in which groups the manifest's shards hold."""
        sizes = self._place.sizes(self._files)
        for shard in self.manifest.shards:
            if sizes.get(shard.file) != shard.bytes:
                where = self._place.said(shard.file)
                raise RequestError(
                    f"{where}: not the {shard.bytes} bytes of the manifest; run `oapl rollouts validate`"
                )
        with ThreadPoolExecutor(self._place.parallel) as threads:
            for groups, prompts in threads.map(self._keys_of, [shard.file for shard in self.manifest.shards]):
                self.taken.update(groups)
                self.committed.update_keys(prompts)

    def _keys_of(self, file: str) -> tuple[Array, Array]:
        """Keys of a shard's groups, and of their prompts."""
        table = self._place.parse(file, lambda source: pq.read_table(source, columns=list(GROUP_KEY)))
        table = table.take(pa.array(group_starts(table)))
        by_policy: dict[tuple[str, int], list[str]] = {}
        for snapshot_id, round, prompt_id in zip(*(table[name].to_pylist() for name in GROUP_KEY), strict=True):
            by_policy.setdefault((snapshot_id, round), []).append(prompt_id)
        keys = [group_keys(snapshot_id, round, ids) for (snapshot_id, round), ids in by_policy.items()]
        prompts = [key64(ids) for ids in by_policy.values()]
        return np.concatenate([NO_KEYS, *keys]), np.concatenate([NO_KEYS, *prompts])

    def _sweep(self) -> None:
        """Deletes what dead writers left: temporary files, and shards that nobody has recorded.

        What a writer of this epoch may be making is left alone. A writer of an earlier one may still be alive: it is
        refused before its next record, and a record that it is just writing is dropped, for its shard is gone.
        """
        folders = ("", f"{COMMITS}/", f"{WRITERS}/") if self._epoch is not None else ("",)
        found = [folder + name for folder in folders for name in self._place.names(folder)]
        recorded = {f"part-{name[len(COMMITS) + 1 : -5]}.parquet" for name in found if name.startswith(f"{COMMITS}/")}
        self._place.delete(
            name
            for name in found
            if (durable.TEMPORARY in name or (_is_shard(name) and name not in self._files and name not in recorded))
            and ((epoch := _EPOCH_OF.search(name)) is None or int(epoch[1]) < (self._epoch or 0))
        )

    def next_name(self) -> str:
        """Name for a shard of the driver's own."""
        self._number += 1
        if self._place.exclusive:
            return f"part-{self._number - 1:05d}.parquet"
        return f"part-{self._epoch:06d}-driver-{secrets.token_hex(4)}-{self._number - 1:05d}.parquet"

    def add(self, shard: Shard, prompt_ids: list[str]) -> None:
        """A shard of the driver's own that is whole; `write` lists it."""
        self._pending.append(_Pending(shard, prompt_ids, []))

    def write(self) -> list[str]:
        """Makes a manifest with all that is pending, durably; returns the prompt_ids that are committed by it."""
        with self.pace.spending():
            return self._write()

    def adopt(self, *, now: bool = False) -> list[str]:
        """Lists the shards that writers have recorded; returns the prompt_ids that are committed by it.

        Without `now` it does nothing while that would take more than its share of the time.
        Raises WorkError for a record of other settings, or one whose shard has not the bytes it says.
        """
        if not now and self.pace.wait():
            return []
        with self.pace.spending():
            return list(chain.from_iterable(self._adoptions()))

    def _adoptions(self) -> Iterator[list[str]]:
        """Lists what is recorded, RECORDS_AT_ONCE by RECORDS_AT_ONCE: while no driver was there, many may have come."""
        there = self._place.names(COMMITS)
        names = [f"{COMMITS}/{name}" for name in there if not name.startswith(durable.TEMPORARY)]
        for first in range(0, max(len(names), 1), RECORDS_AT_ONCE):
            some = self._place.read_many(names[first : first + RECORDS_AT_ONCE])
            records = {name: self._parsed(name, data) for name, data in some.items()}
            sizes = self._place.sizes(record.shard.file for record in records.values())
            for name, record in records.items():
                self._fold(name, record, sizes.get(record.shard.file))
            yield self._write()

    def _parsed(self, name: str, data: bytes) -> Record:
        where = self._place.said(name)
        try:
            record = Record.model_validate_json(data)
        except ValidationError:
            raise WorkError(f"{where}: not the record of a shard; delete it, and its groups are made again") from None
        if record.identity != self._identity:
            raise WorkError(
                f"{where}: its writer had other settings than the dataset; delete it and {record.shard.file}"
            )
        return record

    def _fold(self, name: str, record: Record, size: int | None) -> None:
        shard = record.shard
        if shard.file in self._files or size is None:
            # Listed, and the driver died before it deleted the record; or swept: an old writer was late.
            self._pending.append(_Pending(None, [], [name]))
            return
        if size != shard.bytes:
            where = self._place.said(shard.file)
            raise WorkError(f"{where}: has {size} bytes and not {shard.bytes}; delete it and {self._place.said(name)}")
        origin = self._provenance
        keys = group_keys(origin.snapshot_id, origin.round, record.prompt_ids)
        doubled = self.taken.has(keys)
        kept = [prompt_id for prompt_id, twice in zip(record.prompt_ids, doubled, strict=True) if not twice]
        done = [name]
        listed: Shard | None = shard
        if doubled.any():  # a replica was lost and its groups made again, and then its record came after all
            done.append(shard.file)
            twice = set(record.prompt_ids) - set(kept)
            listed = self._rewrite(shard.file, self.next_name(), twice) if kept else None
        if listed is not None:
            self._files.add(listed.file)
        self.taken.update(keys)
        self._pending.append(_Pending(listed, kept, done))

    def _write(self) -> list[str]:
        pending = self._pending
        shards = [one.shard for one in pending if one.shard is not None]
        if shards:
            manifest = self.manifest.with_shards(shards)
            try:
                self._tag = self._place.replace(MANIFEST, self._encoded(manifest), self._tag)
            except Overtaken:
                raise WorkError(
                    f"{self._place.said()}: another driver has taken this dataset over, and this one stops; "
                    f"what it had committed ({self.manifest.rows} rows) stays valid"
                ) from None
            self.manifest = manifest
        self._pending = []
        self._place.delete(name for one in pending for name in one.done)
        committed = [prompt_id for one in pending for prompt_id in one.prompt_ids]
        self.committed.update(committed)
        return committed


def _is_shard(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")
