"""Snapshots: immutable policies in Hugging Face format, named by step and content, loaded by path, checked by hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RequestError, WorkError
from pipeline.layout import Run
from pipeline.storage.durable import sha256_file, sync_file, write_durably
from pipeline.storage.working_copy import Marks

RECORD = "snapshot.json"
MOMENTS, KEPT_RECORD = ".optimizer", "kept.json"
"""Beside the snapshots, the folder of what is kept of each for the next round; there, the record of what it is."""
MARKS = Marks(records=(RECORD, KEPT_RECORD), shown=(MOMENTS,), by_content=(RECORD,))
"""Of a folder of snapshots that is sent to a URL."""
PARTIAL, KILLED_S = ".partial-", 24 * 3600
KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that make the policy; anything else in it is not copied."""


class Snapshot(BaseModel):
    """What `snapshot.json` records beside the weights."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    snapshot_id: str
    """`<step>-<first 8 hex digits of sha256>`, also the folder's name."""
    parent: str | None
    """The snapshot it was trained from; null for a start."""
    round: int | None
    """The round whose training published it; null for a start."""
    step: int
    """Optimizer steps since the start, over all rounds."""
    sha256: str
    """Over the names and hashes of all files: the policy's identity."""
    tokenizer_sha256: str
    chat_template_sha256: str
    recipe_sha256: str | None
    files: dict[str, str]
    """SHA-256 of each file."""


def publish(
    folder: Path,
    fill: Callable[[Path], Mapping[str, str] | None],
    *,
    parent: str | None,
    round: int | None,
    step: int,
    recipe_sha256: str | None,
) -> Snapshot:
    """Lets `fill` write a policy into a fresh folder, hashes it, and renames it to its place below `folder`.

    `fill` may return the hashes of files that it hashed while it wrote them. Nobody sees a half-written snapshot; one
    that is there already is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _forget_killed(folder)
    partial = folder / f"{PARTIAL}{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        known = fill(partial) or {}
        snapshot = describe(partial, parent=parent, round=round, step=step, recipe_sha256=recipe_sha256, known=known)
        (partial / RECORD).write_text(snapshot.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            sync_file(path)
        place = folder / snapshot.snapshot_id
        if not place.exists():
            partial.rename(place)
            sync_file(folder)
        return load_record(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _forget_killed(folder: Path) -> None:
    """Deletes what publishers that were killed long ago left: weights are large. A live one is never that old."""
    for old in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # another publisher deletes, too
            if time.time() - old.stat().st_mtime > KILLED_S:
                shutil.rmtree(old, ignore_errors=True)


def describe(
    folder: Path,
    *,
    parent: str | None,
    round: int | None,
    step: int,
    recipe_sha256: str | None,
    known: Mapping[str, str] | None = None,
) -> Snapshot:
    """The record of the policy that lies in `folder`, hashes computed from its files where they are not `known`."""
    known = known or {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != RECORD)
    files = {name: known.get(name) or sha256_file(folder / name) for name in names}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return Snapshot(
        snapshot_id=f"{step:06d}-{digest[:8]}",
        parent=parent,
        round=round,
        step=step,
        sha256=digest,
        tokenizer_sha256=tokenizer_sha256(folder),
        chat_template_sha256=chat_template_sha256(folder),
        recipe_sha256=recipe_sha256,
        files=files,
    )


def put_kept(partial: Path, folder: Path, snapshot_id: str, parent: str) -> None:
    """Renames what is kept with a snapshot to its place in `folder`; of others, only the parent's is kept on."""
    for path in partial.iterdir():
        sync_file(path)
    shutil.rmtree(folder / snapshot_id, ignore_errors=True)
    partial.rename(folder / snapshot_id)
    sync_file(folder)
    for old in folder.iterdir():
        if old.is_dir() and old.name not in (snapshot_id, parent):
            shutil.rmtree(old)


def kept_base(folder: Path) -> str | None:
    """The snapshot whose weights the adapters that are kept in `folder` belong to; null where there are none."""
    base = kept_record(folder)["base"] if (folder / KEPT_RECORD).exists() else None
    return None if base is None else str(base["snapshot_id"])


def kept_record(folder: Path) -> dict[str, Any]:
    """The record of what is kept in `folder`. Raises RequestError where it can't be read."""
    path = folder / KEPT_RECORD
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"adapters", "optimizer_steps", "base"} <= record.keys():
        raise RequestError(f"{path}: not a record of what was kept; delete its folder to begin from the snapshot alone")
    return record


def load_record(folder: Path) -> Snapshot:
    """The record of a policy's folder; for a plain Hugging Face folder one is made up from its files.

    Raises RequestError where the folder holds no policy.
    """
    record = folder / RECORD
    if record.exists():
        return parse_record(record.read_bytes(), str(record))
    if not (folder / "config.json").exists():
        raise RequestError(
            f"no policy in {folder}: expected a folder with config.json, weights and tokenizer in Hugging Face format"
        )
    if not any(folder.glob("*.safetensors")):
        raise RequestError(f"no weights in {folder}: expected *.safetensors beside config.json")
    return describe(folder, parent=None, round=None, step=0, recipe_sha256=None)


def parse_record(data: bytes, where: str) -> Snapshot:
    """The record in these bytes of a snapshot.json; `where` is what the error names."""
    try:
        snapshot = Snapshot.model_validate_json(data)
    except ValidationError:
        raise RequestError(
            f"{where}: not a snapshot record; restore the file, or delete it to treat its folder as a plain model"
        ) from None
    for name in snapshot.files:
        if Path(name).name != name:  # it would lead out of the folder that it is brought into
            raise RequestError(f"{where}: {name!r} is no plain file name; refuse this snapshot")
    return snapshot


def verify(folder: Path) -> Snapshot:
    """The record, after checking each file against it. Raises WorkError naming the first file that differs."""
    snapshot = load_record(folder)
    for name, expected in snapshot.files.items():
        path = folder / name
        if not path.exists():
            raise WorkError(f"snapshot {folder}: {name} is missing; copy it from where the snapshot was made")
        if sha256_file(path) != expected:
            raise WorkError(
                f"snapshot {folder}: {name} is not what was published; delete the folder and fetch it again"
            )
    return snapshot


def adopt(source: Path, folder: Path) -> Snapshot:
    """Publishes a copy of a policy's folder as a start below `folder`, where it can't change."""
    load_record(source)  # one clear line where it holds no policy

    def fill(partial: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != RECORD and path.suffix in KEPT:
                shutil.copyfile(path, partial / path.name)

    return publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)


def newest(run: Run, round: int | None) -> Snapshot | None:
    """The newest snapshot that a round published (None: the start), or null where there is none."""
    found = [(path.stat().st_mtime_ns, load_record(path.parent)) for path in run.snapshots.glob(f"[!.]*/{RECORD}")]
    fitting = [(time, snapshot) for time, snapshot in found if snapshot.round == round]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def published_before(run: Run, round: int) -> Snapshot:
    """What the round learns from there on: the newest that the round before published; the start for round 0 and less.

    Raises RequestError where there is none.
    """
    before = round - 1 if round > 0 else None
    snapshot = newest(run, before)
    if snapshot is None:
        missing = "the run has no start" if before is None else f"round {before} has published no snapshot"
        raise RequestError(f"run {run.name}: {missing}; materialise that first")
    return snapshot


def frozen_for(run: Run, round: int, lag: int) -> Snapshot:
    """The snapshot that the round is generated with, settled once and recorded.

    Without `lag` it is the one before; else what was published that many rounds earlier.
    """
    record = run.frozen(round)
    if record.exists():
        return load_record(run.snapshot(json.loads(record.read_text(encoding="utf-8"))["snapshot_id"]))
    try:
        snapshot = published_before(run, round - lag)
    except RequestError as error:
        raise RequestError(f"round {round} has no policy to freeze: {error}") from None
    record.parent.mkdir(parents=True, exist_ok=True)
    write_durably(record, (json.dumps({"snapshot_id": snapshot.snapshot_id}) + "\n").encode())
    return snapshot


def tokenizer_sha256(folder: Path) -> str:
    """Identity of the tokenizer: two policies with one hash turn the same ids into the same text."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    return _hash_of(folder, names)


def chat_template_sha256(folder: Path) -> str:
    config = folder / "tokenizer_config.json"
    inline = json.loads(config.read_text(encoding="utf-8")).get("chat_template", "") if config.exists() else ""
    return hashlib.sha256((json.dumps(inline) + _hash_of(folder, ("chat_template.jinja",))).encode()).hexdigest()


def _hash_of(folder: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).exists():
            digest.update(f"{name}\0{sha256_file(folder / name)}\0".encode())
    return digest.hexdigest()
