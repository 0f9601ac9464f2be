"""Giving a dataset away and taking one in: folders, any fsspec URL, the Hub.

    dataset/
      README.md  croissant.json  SHA256SUMS
      rollouts/manifest.json  rollouts/part-00000.parquet ...
      prompts/prompts.parquet
      verdicts/...

SHA256SUMS is written last and read first: without it there is no dataset, so that a half-finished push can't be
imported. An import is verified in a temporary folder and becomes visible in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.rollouts import schema
from pipeline.rollouts.locate import EXTRAS, PROMPTS, ROLLOUTS, SUMS, VERDICTS, Located, locate
from pipeline.rollouts.mirror import local_copy
from pipeline.rollouts.statistics import statistics
from pipeline.rollouts.store import iter_batches, read_manifest
from pipeline.rollouts.tables import keep_order, prompt_batches, verdict_files
from pipeline.rollouts.validate import validate
from pipeline.sharing.card import write_card, write_croissant
from pipeline.storage import durable
from pipeline.storage.objects import filesystem_of, is_object_store
from pipeline.storage.places import is_url

HUB = "hf://datasets/"
_NAME = re.compile(r"^(?:[A-Za-z0-9_=-][A-Za-z0-9._=+-]*/)*[A-Za-z0-9_=-][A-Za-z0-9._=+-]*$")
_BLOCK = 4 << 20


@contextlib.contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` in one step, on leaving without an exception.

    Raises RequestError where `out` has something in it, unless it may be replaced.
    """
    out = Path(out).absolute()
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: is not empty; choose another folder")
    temporary = out.parent / f"{durable.TEMPORARY}{os.getpid()}-{out.name}"
    with durable.told_in_one_line(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                durable.sync_file(path)
            durable.sync_folder(temporary)
            _move(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, out: Path) -> None:
    old = temporary.with_name(f"{temporary.name}-old")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    durable.sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def export_dataset(
    place: Located, out: Path, *, licence: str = "unknown", title: str | None = None, replace: bool = False
) -> dict[str, Any]:
    """Writes a complete Hugging Face dataset to `out`; returns its numbers (see Statistics.as_dict).

    Shards and verdicts are copied byte by byte, prompts are those that the rollouts are of. Raises RequestError for
    a place without prompts or an `out` that is not empty.
    """
    if place.prompts is None:
        raise RequestError(f"{place.root}: no prompts beside the rollouts; a dataset without them is no use to others")
    manifest = read_manifest(place.rollouts)
    with new_folder(out, replace) as folder:
        (folder / ROLLOUTS).mkdir()
        for shard in manifest.shards:
            shutil.copyfile(local_copy(place.rollouts / shard.file), folder / ROLLOUTS / shard.file)
            if durable.sha256_file(folder / ROLLOUTS / shard.file) != shard.sha256:
                raise WorkError(f"{place.rollouts / shard.file}: its bytes were changed; run `oapl rollouts validate`")
        manifest.save(folder / ROLLOUTS)
        used = {key for batch in iter_batches(place.rollouts, ["prompt_id"]) for key in batch["prompt_id"].to_pylist()}
        copy_prompts(place.prompts, folder / PROMPTS, used)
        if place.verdicts is not None:
            shutil.copytree(place.verdicts, folder / VERDICTS, ignore=shutil.ignore_patterns(".*"))
        if (place.root / EXTRAS).is_file():
            (folder / EXTRAS).parent.mkdir()
            shutil.copyfile(place.root / EXTRAS, folder / EXTRAS)
        return describe(folder, licence, title)


def copy_prompts(source: Path, target: Path, used: set[str]) -> None:
    """Writes the prompts of `source` whose id is in `used`, one row group after the other."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    target.parent.mkdir(parents=True, exist_ok=True)
    wanted = pa.array(sorted(used), pa.string())
    metadata = {"oapl.schema_version": str(schema.SCHEMA_VERSION), "oapl.table": "prompts"}
    with pq.ParquetWriter(target, schema.PROMPTS.with_metadata(metadata), compression="zstd") as writer:
        for batch in prompt_batches(source):
            writer.write_batch(batch.filter(pc.is_in(batch["prompt_id"], wanted)))


def describe(folder: Path, licence: str, title: str | None) -> dict[str, Any]:
    """Writes card, Croissant and checksums of a dataset whose tables are in place; returns its numbers."""
    place = locate(folder)
    manifest = read_manifest(place.rollouts)
    numbers = statistics(place, manifest)
    origin = manifest.provenance
    title = title or f"Rollouts of {origin.snapshot_id}, round {origin.round}"
    write_card(folder, manifest, numbers, licence, title)
    write_croissant(folder, manifest, licence, title)
    write_sums(folder)
    return numbers.as_dict()


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS, in the form that `sha256sum -c` reads; verdict files last, the newest at the end."""
    verdicts = [path.relative_to(folder).as_posix() for path in verdict_files(folder / VERDICTS)]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [*(name for name in names if name not in verdicts), *verdicts]
    lines = [f"{durable.sha256_file(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines))


def read_sums(data: bytes, where: str) -> dict[str, str]:
    """File name to SHA-256. Raises RequestError for a bad line, and for a name that leads out of the folder."""
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not _NAME.match(name) or ".." in name.split("/"):
            raise RequestError(
                f"{where}/{SUMS}, line {number}: not a checksum and a plain file name; refuse this dataset"
            )
        sums[name] = digest
    return sums


def import_dataset(source: str, out: Path, *, replace: bool = False) -> int:
    """Takes in an exported dataset from a folder, an fsspec URL or the Hub (`hf://datasets/OWNER/NAME`); returns rows.

    Everything is verified before `out` appears: each file's checksum, then what `validate` looks at. With `replace`
    an `out` that holds the same dataset already is left as it is. Raises RequestError or WorkError in one line.
    """
    out = Path(out)
    with reading(source) as (read, where):
        sums_bytes = b"".join(read(SUMS))
        sums = read_sums(sums_bytes, where)
        kept = out / SUMS
        if replace and kept.is_file() and kept.read_bytes() == sums_bytes:
            return read_manifest(out / ROLLOUTS).rows
        with new_folder(out, replace) as folder:
            for name, expected in sums.items():
                _fetch(read(name), folder / name, expected, f"{where}/{name}")
            (folder / SUMS).write_bytes(sums_bytes)
            keep_order(
                [folder / name for name in sums if name.startswith(f"{VERDICTS}/") and name.endswith(".parquet")]
            )
            return verified(folder, where)


def verified(folder: Path, where: str) -> int:
    """Rows of a dataset that has passed `validate`. Raises WorkError with the first problems of one that has not."""
    place = locate(folder)
    problems = list(islice(validate(place), 4))
    if problems:
        more = "; ..." if len(problems) == 4 else ""
        raise WorkError(f"{where}: does not validate ({'; '.join(map(str, problems[:3]))}{more}); nothing was imported")
    return read_manifest(place.rollouts).rows


def _fetch(blocks: Iterator[bytes], target: Path, expected: str, where: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != expected:
        raise WorkError(f"{where}: its checksum is not the one in {SUMS}; nothing was imported, fetch it again")


@contextlib.contextmanager
def reading(source: str) -> Iterator[Any]:
    """(read, name): `read(file)` streams one of the source's files in blocks."""
    from pipeline.sharing import hub

    if hub.is_hub(source):
        with hub.reading(source) as read_hub:
            yield read_hub, source
        return
    filesystem, root = filesystem_of(source)

    def read(name: str) -> Iterator[bytes]:
        with _remote(source, name), filesystem.open(f"{root}/{name}", "rb") as file:
            while block := file.read(_BLOCK):
                yield block

    yield read, source.rstrip("/")


def push_dataset(folder: Path, to: str) -> int:
    """Copies an exported dataset to a folder, an fsspec URL or the Hub; returns the bytes sent.

    The checksums go last, and those of an older dataset at the target go first, so that nobody can import a
    mixture. Raises RequestError for a folder that is no exported dataset, WorkError where the target refuses.
    """
    from pipeline.sharing import hub

    folder = Path(folder)
    if not (folder / SUMS).is_file():
        raise RequestError(f"{folder}: no {SUMS}, so no exported dataset; run `oapl rollouts export` first")
    sums = read_sums((folder / SUMS).read_bytes(), str(folder))
    for name, expected in sums.items():
        if not (folder / name).is_file() or durable.sha256_file(folder / name) != expected:
            raise WorkError(f"{folder / name}: is not what {SUMS} says; export the dataset again before it is pushed")
    if hub.is_hub(to):
        return hub.push(folder, to, [*sums, SUMS])
    if not is_url(to):
        with new_folder(Path(to)) as copy:
            return sum(_copy(folder / name, copy / name) for name in [*sums, SUMS])
    filesystem, root = filesystem_of(to)
    with _remote(to, ""):
        if filesystem.exists(f"{root}/{SUMS}"):
            filesystem.rm(f"{root}/{SUMS}")
        sent = 0
        for name in [*sums, SUMS]:
            if not is_object_store(filesystem):
                filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            with (folder / name).open("rb") as local, filesystem.open(f"{root}/{name}", "wb") as remote:
                shutil.copyfileobj(local, remote, _BLOCK)
            sent += (folder / name).stat().st_size
    return sent


def _copy(source: Path, target: Path) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)  # with its time of change, which orders verdict files
    return target.stat().st_size


@contextlib.contextmanager
def _remote(url: str, name: str) -> Iterator[None]:
    where = f"{url.rstrip('/')}/{name}".rstrip("/")
    try:
        yield
    except FileNotFoundError:
        raise RequestError(f"{where}: not found; give an exported dataset (it has {SUMS})") from None
    except OaplError:
        raise
    except Exception as error:  # each back end has exceptions of its own; a person needs the place and the reason
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WorkError(f"{where}: {reason}; check the address and the credentials, then run again") from error
