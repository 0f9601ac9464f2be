"""Writing into one dataset from many processes on many machines, none of which waits for another.

Each process has a ShardWriter. It puts a shard under a name that no other writer can have and then, when the shard
is durable, a small record of it. The one driver (a RolloutWriter with `shared=True`) lists recorded shards in the
manifest; no rollout passes through it. See `ledger` for what holds when writers or the driver die.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import pyarrow as pa

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.arrow import Packed
from pipeline.rollouts.keys import Keys
from pipeline.rollouts.ledger import COMMITS, EPOCH, Epoch, Record
from pipeline.rollouts.manifest import Provenance, identity
from pipeline.rollouts.store import GroupWriter, key_of, put_shard
from pipeline.storage.open import place_of


class ShardWriter(GroupWriter):
    """Makes shards for a dataset that a driver has opened with `shared=True`; a context manager.

    `folder` is a folder that the driver sees, too, or a URL. `writer` names this process for people (letters, digits,
    `.`, `_`); two writers of one name do not meet. A group is recorded, and only then safe, when its shard is full,
    after `commit`, or on leaving the context; `recorded` counts those groups.

    Raises RequestError where no driver has opened the folder or its settings are others, WorkError where the file
    system refuses, and where a newer driver has taken over: what was recorded before stays.
    """

    recorded: int
    """Groups whose shard and record are durable."""

    def __init__(
        self,
        folder: Path | str,
        provenance: Provenance,
        *,
        samples: int | None,
        writer: str,
        shard_rows: int = 4096,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._]{1,64}", writer):
            raise RequestError(f"writer {writer!r}: its name may have letters, digits, '.' and '_', 1 to 64 of them")
        super().__init__(place_of(folder), provenance, samples, shard_rows)
        self.recorded = 0
        self._keys = Keys()
        self._number = 0
        try:
            epoch = self._read_epoch()
        except FileNotFoundError:
            raise RequestError(
                f"{self._place.said()}: no driver has opened this folder to many writers; start it first"
            ) from None
        except OSError as error:
            raise self._place.work_error(error) from error
        self._place.pin()
        self._identity = identity(provenance, samples)
        if epoch.identity != self._identity:
            raise RequestError(
                f"{self._place.said()}: the driver has opened it for rollouts of other settings; "
                "give this writer the driver's provenance and group size"
            )
        self._epoch = epoch.number
        # Random, so that a replica that was given up and the one in its place can't meet in a name.
        self._stem = f"{epoch.number:06d}-{writer}-{secrets.token_hex(4)}"

    def _read_epoch(self) -> Epoch:
        return Epoch.model_validate_json(self._place.read(EPOCH))

    def _refuse_old_epoch(self) -> None:
        now = self._read_epoch().number
        if now != self._epoch:
            raise WorkError(
                f"{self._place.said()}: a newer driver has taken over (its epoch is {now}, this writer's "
                f"{self._epoch}); {self.recorded} groups of this writer are recorded, the others are made again"
            )

    def _groups_taken(self) -> Keys:
        return self._keys

    def _write(self, groups: list[Packed | pa.RecordBatch]) -> None:
        name = f"{self._stem}-{self._number:05d}"
        self._number += 1
        try:
            shard = put_shard(self._place, f"part-{name}.parquet", groups, self._provenance)
        except OSError:
            self._refuse_old_epoch()  # the new driver's sweep takes a file that is being written: say that, then
            raise
        prompt_ids = sorted(key_of(group)[2] for group in groups)
        record = Record(epoch=self._epoch, identity=self._identity, shard=shard, prompt_ids=prompt_ids)
        self._refuse_old_epoch()
        self._place.write(f"{COMMITS}/{name}.json", record.model_dump_json().encode())
        self.recorded += len(groups)

    def _kept(self) -> str:
        return f" ({self.recorded} groups of this writer are recorded and stay valid)"
