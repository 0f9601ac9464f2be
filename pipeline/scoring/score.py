"""Verdicts of a round: rollouts joined to their prompts, judged, and kept beside them.

A round's verdicts are a folder with one Parquet file for each verifier and version, in the rollouts' order. Judging
again with a newer verifier writes a new file; the rollouts and the old verdicts stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError, WorkError
from pipeline.rollouts.locate import SUMMARY
from pipeline.scoring.canaries import CANARIES
from pipeline.scoring.on_ray import judged_on_ray
from pipeline.scoring.references import References
from pipeline.storage.durable import replacing, sha256_file, write_durably
from pipeline.verifiers import find_verifier, judge
from pipeline.verifiers.cases import Case
from pipeline.verifiers.spool import Spool

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.recipe import Verification

SETTLED = ("correct", "wrong", "no_answer")
MOST_UNSETTLED = 0.01
"""Share of verdicts that may be neither correct nor wrong nor no_answer before a check fails."""
FLIPS_SHOWN = 20
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Flips:
    """How a verifier's verdicts differ from those of the version before."""

    verifier: str
    old_version: str
    new_version: str
    compared: int
    flipped: int
    examples: list[dict[str, str]]
    """rollout_id, old and new status, and the new detail of the first few."""


@dataclass(frozen=True, slots=True)
class ScoringSummary:
    """What a round's judging came to. `seconds` is wall-clock time of this call only."""

    rows: int
    statuses: dict[str, int]
    by_verifier: dict[str, dict[str, int]]
    versions: dict[str, str]
    reward_mean: float | None
    """Over the verdicts that have a reward; None where none has."""
    isolation: dict[str, int]
    canaries: int
    flipped_canaries: list[str]
    flips: list[Flips] = field(default_factory=list)

    @property
    def unsettled_share(self) -> float:
        settled = sum(self.statuses.get(status, 0) for status in SETTLED)
        return 1 - settled / self.rows if self.rows else 0.0

    def problems(self) -> list[str]:
        """One line for each thing that should stop a round; empty when the verdicts can be trusted."""
        found = [f"canary {name}" for name in self.flipped_canaries]
        if self.unsettled_share > MOST_UNSETTLED:
            odd = {status: count for status, count in self.statuses.items() if status not in SETTLED}
            words = ", ".join(f"{count} {status}" for status, count in sorted(odd.items()))
            found.append(f"{self.unsettled_share:.1%} of {self.rows} verdicts are neither right nor wrong: {words}")
        return found


def score(
    rollouts: Path,
    prompts: Path,
    out: Path,
    settings: Verification,
    progress: Callable[[int, int], None] | None = None,
) -> ScoringSummary:
    """Judges all rollouts of a folder and writes `out/<verifier>-<version>.parquet`.

    Interrupted, it goes on where it was; finished, a second call with the same rollouts, prompts and settings only
    reads the summary. `progress(done, total)` is called for each verdict, with `engine: ray` for each shard. Memory
    holds the prompts' ids, not their tests, and eight bytes a rollout. Raises RequestError for a rollout whose prompt
    is not in `prompts`.
    """
    from pipeline.rollouts.store import read_manifest

    manifest = read_manifest(rollouts)
    with contextlib.closing(References(prompts)) as references:
        tasks = sorted(references.tasks)
        versions = {find_verifier(task).name: find_verifier(task).version() for task in tasks}
        judged = settings.model_dump(mode="json", exclude={"workers", "engine"})
        told = json.dumps([manifest.digest, sha256_file(prompts), judged, versions], sort_keys=True)
        journal = hashlib.sha256(told.encode()).hexdigest()
        done = _finished(out, journal)
        if done is not None:
            return done
        out.mkdir(parents=True, exist_ok=True)
        if settings.engine == "ray":
            with judged_on_ray(rollouts, manifest, references, out, journal, settings, progress) as verdicts:
                summary = _write(out, rollouts, manifest.rows, verdicts, tasks)
        else:
            with Spool(out / ".scoring.spool", journal) as spool:
                _judge_all(rollouts, references, manifest.rows, spool, settings, progress)
                summary = _write(out, rollouts, manifest.rows, spool.in_order(), tasks)
    write_durably(out / SUMMARY, json.dumps({"journal": journal, **asdict(summary)}, indent=1).encode())
    return summary


def _finished(out: Path, journal: str) -> ScoringSummary | None:
    summary = read_summary(out)
    if summary is None or json.loads((out / SUMMARY).read_bytes())["journal"] != journal:
        return None
    files = [out / verdict_file(name, version) for name, version in summary.versions.items()]
    return summary if all(file.is_file() for file in files) else None


def read_summary(out: Path) -> ScoringSummary | None:
    """The summary of the last judging in the folder, or None where there was none."""
    try:
        fields = json.loads((out / SUMMARY).read_bytes())
    except FileNotFoundError:
        return None
    del fields["journal"]
    return ScoringSummary(**{**fields, "flips": [Flips(**flips) for flips in fields["flips"]]})


def _cases(rollouts: Path, references: References, spool: Spool) -> Iterator[Case]:
    from pipeline.rollouts.store import iter_batches

    number = 0
    for batch in iter_batches(rollouts, ["prompt_id", "completion"]):
        for prompt_id, completion in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
            if not spool.done(number):
                yield Case(str(number), references.find(prompt_id)[0], completion, *references.find(prompt_id)[1:])
            number += 1


def _canary_cases(tasks: Iterable[str], first: int, spool: Spool) -> Iterator[Case]:
    for place, (case, _) in enumerate(CANARIES):
        if case.task in tasks and not spool.done(first + place):
            yield Case(str(first + place), case.task, case.response, case.answer, case.tests)


def _judge_all(
    rollouts: Path,
    references: References,
    rows: int,
    spool: Spool,
    settings: Verification,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Canaries come first: a verifier that is broken is known before a long judging begins."""

    def cases() -> Iterator[Case]:
        yield from _canary_cases(references.tasks, rows, spool)
        yield from _cases(rollouts, references, spool)

    done = sum(1 for number in range(rows) if spool.done(number))
    with contextlib.closing(judge(cases(), settings)) as verdicts:  # type: ignore[type-var]
        for verdict in verdicts:
            spool.add(verdict)
            if int(verdict.id) < rows:
                done += 1
                if progress is not None:
                    progress(done, rows)


def _write(
    out: Path, rollouts: Path, rows: int, verdicts: Iterable[tuple[int, dict[str, Any]]], tasks: list[str]
) -> ScoringSummary:
    """The verdicts, numbered in the rollouts' order, as Parquet, and what they come to; canaries are behind them."""
    by_verifier: dict[str, Counter[str]] = {}
    isolation: Counter[str] = Counter()
    versions: dict[str, str] = {}
    rewards, rewarded, written = 0.0, 0, 0
    flipped = []
    with _Files(out) as files:
        ids = _ids(rollouts)
        for number, fields in verdicts:
            if number >= rows:
                case, expected = CANARIES[number - rows]
                if fields["status"] != expected:
                    flipped.append(f"{case.id}: {fields['status']} instead of {expected} ({fields['detail']})")
                continue
            verdict = {"rollout_id": next(ids), **fields}
            files.add(verdict)
            versions[verdict["verifier"]] = verdict["verifier_version"]
            by_verifier.setdefault(verdict["verifier"], Counter())[verdict["status"]] += 1
            isolation[verdict["isolation"]] += 1
            written += 1
            if verdict["reward"] is not None:
                rewards, rewarded = rewards + verdict["reward"], rewarded + 1
        if written != rows:
            raise WorkError(f"{out}: {written} verdicts for {rows} rollouts; delete what begins with .scoring in it")
    return ScoringSummary(
        rows=rows,
        statuses=dict(sum(by_verifier.values(), Counter())),
        by_verifier={name: dict(counts) for name, counts in by_verifier.items()},
        versions=versions,
        reward_mean=rewards / rewarded if rewarded else None,
        isolation=dict(isolation),
        canaries=sum(case.task in tasks for case, _ in CANARIES),
        flipped_canaries=flipped,
        flips=[found for name, version in versions.items() if (found := flips_of(out, name, version))],
    )


def _ids(rollouts: Path) -> Iterator[str]:
    from pipeline.rollouts.store import iter_batches

    for batch in iter_batches(rollouts, ["rollout_id"]):
        yield from batch[0].to_pylist()


def verdict_file(verifier: str, version: str) -> str:
    """Name of the file of one verifier's version."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "_", verifier) + "-" + re.sub(r"[^A-Za-z0-9.+_-]+", "_", version) + ".parquet"


class _Files:
    """A Parquet writer for each verifier and version; all files appear together at the end, or none."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, Any] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, verdict: dict[str, Any]) -> None:
        name = verdict_file(verdict["verifier"], verdict["verifier_version"])
        rows = self._rows.setdefault(name, [])
        rows.append(verdict)
        if len(rows) >= _ROWS:
            self._flush(name)

    def _flush(self, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from pipeline.rollouts.schema import SCHEMA_VERSION, VERDICTS

        schema = VERDICTS.with_metadata({b"oapl.schema_version": str(SCHEMA_VERSION).encode()})
        if name not in self._writers:
            path = self._stack.enter_context(replacing(self._out / name))
            writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
            self._writers[name] = self._stack.enter_context(writer)
        self._writers[name].write_table(pa.Table.from_pylist(self._rows[name], schema=schema))
        self._rows[name] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            for name, rows in self._rows.items():
                if rows or name not in self._writers:
                    self._flush(name)
        self._stack.__exit__(kind, error, trace)


def _files_of(folder: Path, version: str | None) -> list[Path]:
    """For each verifier its newest file, or the one of that version where it has one."""
    from pipeline.rollouts.tables import judged_by

    chosen: dict[str, tuple[bool, int, Path]] = {}
    for path in folder.glob("[!.]*.parquet"):
        verifier, found = judged_by(path)
        if verifier is None:
            continue
        rank = (found == version, path.stat().st_mtime_ns, path)
        chosen[verifier] = max(rank, chosen.get(verifier, rank))
    if version is not None and chosen and not any(rank[0] for rank in chosen.values()):
        raise RequestError(f"{folder}: no verdicts of verifier version {version!r}")
    return sorted(path for _, _, path in chosen.values())


def read_verdicts(folder: Path, version: str | None = None) -> Iterator[pa.RecordBatch]:
    """Verdicts of a round, one a rollout: of each verifier its newest version, or `version` where it has that.

    Raises RequestError where there is no folder, or no verifier has that version.
    """
    from pipeline.rollouts.schema import VERDICTS
    from pipeline.rollouts.tables import parquet_batches

    if not folder.is_dir():
        raise RequestError(f"{folder}: no verdicts here; judge the round first")
    for path in _files_of(folder, version):
        yield from parquet_batches(path, None, VERDICTS)


def verdicts_of(folder: Path, ids: Iterable[str], version: str | None = None) -> dict[str, tuple[str, float | None]]:
    """(status, reward) of the rollouts asked for; those without a verdict are left out."""
    wanted = set(ids)
    found: dict[str, tuple[str, float | None]] = {}
    for batch in read_verdicts(folder, version):
        columns = (batch[name].to_pylist() for name in ("rollout_id", "status", "reward"))
        for rollout_id, status, reward in zip(*columns, strict=True):
            if rollout_id in wanted:
                found[rollout_id] = status, reward
    return found


def flips_of(folder: Path, verifier: str, version: str) -> Flips | None:
    """How `version` differs from the newest other version of the verifier in the folder; None where there is none.

    Both files are in the rollouts' order and are read side by side.
    """
    from pipeline.rollouts.tables import judged_by

    new = folder / verdict_file(verifier, version)
    others = []
    for path in folder.glob("[!.]*.parquet"):
        found, its_version = judged_by(path)
        if path != new and found == verifier and its_version is not None:
            others.append((path.stat().st_mtime_ns, path, its_version))
    if not others or not new.is_file():
        return None
    _, old, old_version = max(others)
    compared, flipped = 0, 0
    examples: list[dict[str, str]] = []
    for before, after in zip(_rows(old), _rows(new), strict=True):
        if before["rollout_id"] != after["rollout_id"]:
            raise WorkError(f"{old}: verdicts of other rollouts than {new.name}; move it elsewhere")
        compared += 1
        if (before["status"], before["reward"]) != (after["status"], after["reward"]):
            flipped += 1
            if len(examples) < FLIPS_SHOWN:
                words = {"old": before["status"], "new": after["status"], "detail": after["detail"]}
                examples.append({"rollout_id": after["rollout_id"], **words})
    return Flips(verifier, old_version, version, compared, flipped, examples)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    from pipeline.rollouts.schema import VERDICTS
    from pipeline.rollouts.tables import parquet_batches

    for batch in parquet_batches(path, ["rollout_id", "status", "reward", "detail"], VERDICTS):
        yield from batch.to_pylist()
