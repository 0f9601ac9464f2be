"""Rollouts at a URL, read as if they were here: the manifest now, each shard when it is first needed.

<cache>/<hash of the URL>-mirror/     laid out as the run, or as what `oapl generate --out` leaves
  rollouts/round=0000/manifest.json, origin.json    origin.json says where its shards are fetched from
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.locate import ROLLOUTS, SUMMARY, SUMS, UNFINISHED, VERDICTS, Located
from pipeline.rollouts.manifest import MANIFEST, Manifest, Shard, parse_manifest
from pipeline.storage import durable
from pipeline.storage.cache import key_of, told
from pipeline.storage.objects import Objects
from pipeline.storage.working_copy import Copy, Marks, copy_of

ORIGIN = "origin.json"
VERDICT_MARKS = Marks(records=(SUMMARY,), unfinished={SUMMARY: UNFINISHED})
"""Of a folder of verdicts that is sent to a URL."""
_ROUND = re.compile(r"(.*)/rollouts/(round=\d+)")


def local_copy(path: Path) -> Path:
    """The shard's path; where it belongs to a mirrored dataset and is not here yet, it is fetched first.

    Of several processes that ask at once one fetches. Raises WorkError where the store refuses, or gives other bytes
    than the manifest says.
    """
    if path.exists() or (url := origin_of(path.parent)) is None:
        return path
    shard = _shards(path.parent / MANIFEST, (path.parent / MANIFEST).stat().st_mtime_ns).get(path.name)
    if shard is None:
        return path
    place = Objects(url)
    with durable.locked(path.with_name(f".fetching-{path.name}")), durable.told_in_one_line(path.parent):
        if not path.exists():
            with durable.replacing(path) as temporary:
                try:
                    place.fetch(path.name, temporary)
                except FileNotFoundError:
                    raise WorkError(f"{place.said(path.name)}: is in the manifest and missing in the store") from None
                except OSError as error:
                    raise place.work_error(error) from error
                if temporary.stat().st_size != shard.bytes or durable.sha256_file(temporary) != shard.sha256:
                    raise WorkError(f"{place.said(path.name)}: its bytes are not those of the manifest; not used")
    return path


def origin_of(rollouts: Path) -> str | None:
    """The URL where mirrored rollouts lie; None for rollouts that lie in this folder."""
    try:
        url: str = json.loads((rollouts / ORIGIN).read_bytes())["url"]
    except FileNotFoundError:
        return None
    return url


def keep_origin(rollouts: Path, url: str) -> None:
    """Notes of a folder with a manifest where its shards are fetched from."""
    if origin_of(rollouts) != url:
        durable.write_durably(rollouts / ORIGIN, json.dumps({"url": url}).encode())


@lru_cache(maxsize=8)
def _shards(manifest: Path, _changed: int) -> dict[str, Shard]:
    return {shard.file: shard for shard in parse_manifest(manifest.read_bytes(), str(manifest)).shards}


def mirrored(url: str, cache: Path, round: int | None) -> tuple[Path, int | None] | None:
    """A local folder for `locate`, and the round in it; None where an exported dataset is there.

    The URL names a run's folder, one round of its rollouts, or what `oapl generate` wrote. Prompts and verdicts are
    brought up to date; shards stay where they are (see `local_copy`). Raises RequestError where nothing is there.
    """
    url = url.rstrip("/")
    # Ranks and stages of one machine may ask at once; a file that one fetches is another's to read.
    with durable.locked(cache / f".{_folder(cache, url).name}.lock"):
        return _mirrored(url, cache, round)


def _mirrored(url: str, cache: Path, round: int | None) -> tuple[Path, int | None] | None:
    named = _ROUND.fullmatch(url)
    with told(url):
        if Objects(url).sizes([SUMS]):
            return None  # an exported dataset is imported, which verifies all of it
        if named is None and Objects(url).sizes([MANIFEST]):
            kept = _folder(cache, url)
            _mirror_rollouts(url, kept)
            _mirror_files(Objects(url), kept, ["prompts.parquet"])
            _mirror_folder(Objects(url), kept, "verdicts")
            return kept, round
        root = url if named is None else named[1]
        place = Objects(root)
        rounds = [named[2]] if named else [name for name in place.folders("rollouts") if name.startswith("round=")]
        if named is None and round is not None:
            rounds = [name for name in rounds if int(name.removeprefix("round=")) == round]
        rounds = [name for name in rounds if place.sizes([f"rollouts/{name}/{MANIFEST}"])]
        if not rounds:
            wanted = "rollouts" if round is None else f"rollouts of round {round}"
            raise RequestError(
                f"{url}: no {wanted} there; give the URL of a run, of generated rollouts, or of an exported dataset"
            )
        newest = max(rounds)
        kept = _folder(cache, root)
        _mirror_rollouts(f"{root}/rollouts/{newest}", kept / "rollouts" / newest)
        _mirror_files(place, kept, ["prompts.parquet", f"prompts/{newest}.parquet"])
        _mirror_folder(place, kept, f"verdicts/{newest}")
        return kept, int(newest.removeprefix("round="))


def _folder(cache: Path, url: str) -> Path:
    return cache / f"{key_of(url)}-mirror"


def _mirror_rollouts(url: str, folder: Path) -> None:
    """The manifest as it is now; shards that it has no more, or other bytes of, are not kept."""
    data = Objects(url).read(MANIFEST)
    manifest = parse_manifest(data, f"{url}/{MANIFEST}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    old: Manifest | None = None
    if path.exists():
        with contextlib.suppress(RequestError):
            old = parse_manifest(path.read_bytes(), str(path))
    if old is None or old.digest != manifest.digest:
        for shard in set(old.shards if old else []) - set(manifest.shards):
            (folder / shard.file).unlink(missing_ok=True)
        durable.write_durably(path, manifest.encoded())
    keep_origin(folder, url)


def _mirror_folder(place: Objects, kept: Path, folder: str) -> None:
    entries = place.entries(folder)
    names = {entry.name for entry in entries}
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    if UNFINISHED in names and SUMMARY not in names:
        entries = []  # some of its files may be missing
    there = kept / folder
    if not entries:
        shutil.rmtree(there, ignore_errors=True)  # an empty folder would be taken for verdicts of nothing
    for path in there.glob("*") if there.is_dir() else []:
        if path.is_file() and not path.name.startswith(".") and path.name not in {entry.name for entry in entries}:
            path.unlink(missing_ok=True)
    _mirror_files(place, kept, [f"{folder}/{entry.name}" for entry in entries])


def _mirror_files(place: Objects, kept: Path, names: list[str]) -> None:
    """Fetches what is new or has changed; with its time of change, which orders verdict files."""
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        prefix = f"{folder}/" if folder else ""
        for entry in place.entries(folder):
            if prefix + entry.name in names:
                _mirror_file(place, kept, prefix + entry.name, entry.bytes, entry.modified)


def _mirror_file(place: Objects, kept: Path, name: str, size: int, modified: float) -> None:
    path = kept / name
    if path.exists() and path.stat().st_size == size and abs(path.stat().st_mtime - modified) < 1e-3:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as temporary:
        place.fetch(name, temporary)
        os.utime(temporary, (modified, modified))


def verdicts_copy(found: Located) -> Copy | None:
    """What stands for the verdicts of rollouts that are read where they lie, at a URL; None for others."""
    origin = origin_of(found.rollouts)
    if origin is None:
        return None
    if found.round is None:
        return copy_of(f"{origin}/{VERDICTS}", VERDICT_MARKS)
    run = origin.removesuffix(f"/{ROLLOUTS}/{found.rollouts.name}")
    return copy_of(f"{run}/{VERDICTS}/{found.rollouts.name}", VERDICT_MARKS)
