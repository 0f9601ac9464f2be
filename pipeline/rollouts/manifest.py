"""What says which shards of a dataset exist, and where its rows come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.errors import RequestError
from pipeline.rollouts.schema import SCHEMA_VERSION
from pipeline.storage import durable
from pipeline.storage.open import place_of

MANIFEST = "manifest.json"

RESUME_IGNORES = frozenset({"recipe", "code_version", "parents"})
"""Provenance that may differ on resume: none of it changes what a prompt's completions are drawn from."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class Provenance(Part):
    """Where a dataset's rows come from. Written by generation or import; read by whoever is given the data."""

    snapshot_id: str
    snapshot_sha256: str
    snapshot_step: int
    round: int
    sampling: dict[str, Any]
    """samples, temperature, top_p, top_k, max_tokens, and the seed they start from."""
    logprobs_mode: str
    """`processed_logprobs`: after temperature, top-p and top-k; `missing`: to be recomputed before learning."""
    engine: str
    engine_version: str
    tokenizer_sha256: str
    chat_template_sha256: str
    recipe: dict[str, Any] | None = None
    code_version: str
    prompts_sha256: str
    parents: list[dict[str, Any]] = []
    """Datasets this one was cut or joined from, each with its digest and the operation."""
    imported: dict[str, Any] | None = None
    """Of data that came in a foreign format: the format, the source, and whether it was re-tokenised."""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Shard:
    """One file of the dataset. Not a Part: there may be tens of thousands, and a model takes a kilobyte more."""

    file: str
    rows: int
    groups: int
    bytes: int
    sha256: str
    tokens: int
    """Completion tokens, not prompt tokens."""


class Manifest(Part):
    """All that exists of a dataset. `digest` is over everything else in it, so over every byte of every shard."""

    version: int = SCHEMA_VERSION
    table: Literal["rollouts"] = "rollouts"
    provenance: Provenance
    samples: int | None
    """Completions of each group; null where groups differ (imports, filters)."""
    shards: list[Shard] = []
    rows: int = 0
    groups: int = 0
    tokens: int = 0
    digest: str = ""

    def sealed(self) -> Manifest:
        """The same with its digest: SHA-256 of the rest as JSON with sorted keys.

        Fed to it shard by shard, as tens of thousands of them would be several times the manifest's size otherwise.
        """
        empty = self.model_dump(mode="json", exclude={"digest", "shards"}) | {"shards": []}
        before, shards, after = json.dumps(empty, sort_keys=True).rpartition('"shards": [')
        digest = hashlib.sha256((before + shards).encode())
        for number, shard in enumerate(self.shards):
            comma = ", " if number else ""
            digest.update((comma + json.dumps(asdict(shard), sort_keys=True)).encode())
        digest.update(after.encode())
        return self.model_copy(update={"digest": digest.hexdigest()})

    def with_shards(self, shards: Sequence[Shard]) -> Manifest:
        return self.model_copy(
            update={
                "shards": [*self.shards, *shards],
                "rows": self.rows + sum(shard.rows for shard in shards),
                "groups": self.groups + sum(shard.groups for shard in shards),
                "tokens": self.tokens + sum(shard.tokens for shard in shards),
            }
        ).sealed()

    def encoded(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()

    def save(self, folder: Path) -> None:
        durable.write_durably(folder / MANIFEST, self.encoded())


def read_manifest(folder: Path | str) -> Manifest:
    """The folder's manifest, its digest checked.

    Raises RequestError in one line where there is none, where it is of another schema version, and where
    it was changed by other hands.
    """
    place = place_of(folder)
    path = place.said(MANIFEST)
    try:
        return parse_manifest(place.read(MANIFEST), path)
    except FileNotFoundError:
        raise RequestError(f"{folder}: no {MANIFEST} here, so no rollout dataset; give a folder that has one") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> RequestError:
    return RequestError(
        f"{path}: can't be read ({' '.join(str(error).split())}); take the dataset from its source again"
    )


def parse_manifest(data: bytes, path: str) -> Manifest:
    """The same of a manifest's bytes; `path` is what the errors name."""
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise _unreadable(path, error) from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path}: schema version {version!r}, and this program reads version {SCHEMA_VERSION}; "
            "install the oapl release that wrote it, or export the dataset with that release again"
        )
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"{path}: {where}: {first['msg']}; take the dataset from its source again") from None
    if manifest.sealed().digest != manifest.digest:
        raise RequestError(f"{path}: its digest does not fit its content; take the dataset from its source again")
    return manifest


def file_metadata(provenance: Provenance) -> dict[str, str]:
    """Key-value metadata of every shard, so that a single file still says what it is."""
    return {
        "oapl.schema_version": str(SCHEMA_VERSION),
        "oapl.table": "rollouts",
        "oapl.provenance": provenance.model_dump_json(),
    }


def differences(manifest: Manifest, provenance: Provenance, samples: int | None) -> list[str]:
    """One phrase for each setting that makes these other rollouts than the manifest's."""
    return _differences(_settings(manifest.provenance, manifest.samples), _settings(provenance, samples))


def identity(provenance: Provenance, samples: int | None) -> str:
    """SHA-256 of all that decides what a prompt's completions are drawn from."""
    return hashlib.sha256(json.dumps(_settings(provenance, samples), sort_keys=True).encode()).hexdigest()


def _settings(provenance: Provenance, samples: int | None) -> dict[str, Any]:
    return provenance.model_dump(mode="json", exclude=set(RESUME_IGNORES)) | {"group size": samples}


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{where}{key}.")
        elif before != after:
            lines.append(f"{where}{key}: {before} there, {after} now")
    return lines
