"""Datasets out of datasets: filter, merge, dedupe, split. Each result is an exported dataset that names its parents.

All of them stream: whole groups come in from `iter_batches` and go out through a RolloutWriter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.rollouts import schema
from pipeline.rollouts.locate import PROMPTS, ROLLOUTS, VERDICTS, Located
from pipeline.rollouts.store import (
    Manifest,
    Provenance,
    RolloutWriter,
    group_key,
    group_starts,
    iter_batches,
    read_manifest,
    split_groups,
)
from pipeline.rollouts.tables import (
    STATUS_NAMES,
    UNKNOWN_PROMPT,
    PromptFacts,
    VerdictIndex,
    keep_order,
    key64,
    parquet_batches,
    prompt_batches,
    prompt_facts,
    verdict_files,
)
from pipeline.sharing.package import describe, new_folder

SEVERAL = "several"
"""Stands in a merged dataset's provenance where its parents differ; `parents` has the values."""

Source = tuple[Located, Iterable[pa.RecordBatch]]
"""A dataset and the groups taken from it, each a batch."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What `filter_dataset` keeps. A condition that is null or empty admits everything."""

    min_pass_rate: float | None = None
    max_pass_rate: float | None = None
    """Bounds, both included, of a group's mean reward; groups without a reward fail any bound."""
    drop_uniform: bool = False
    """Drop groups whose rewards are all equal."""
    tasks: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None
    where: str | None = None
    """SQL condition on a row: columns of rollouts, and task, source, split, status, reward, tokens, pass_rate."""
    keep: str = "any"
    """A group is kept whole where `any` or `all` of its rows fit the conditions on rows (statuses, tokens, where);
    `rows` keeps the fitting rows only: V(x) is then estimated from a selection, which biases it."""


def parent_of(manifest: Manifest, operation: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a result records of a dataset that it was made from."""
    return {
        "operation": operation,
        "settings": settings or {},
        "digest": manifest.digest,
        "rows": manifest.rows,
        "groups": manifest.groups,
        "samples": manifest.samples,
        "provenance": manifest.provenance.model_dump(mode="json", exclude={"recipe"}),
    }


def filter_dataset(place: Located, out: Path, conditions: Conditions, *, licence: str = "unknown") -> dict[str, Any]:
    """Writes the groups that fit to `out`; returns its numbers. Raises RequestError where none fits."""
    manifest = read_manifest(place.rollouts)
    unknown = [status for status in conditions.statuses if status not in STATUS_NAMES]
    if unknown:
        raise RequestError(f"--status {unknown[0]}: no such status; there are {', '.join(STATUS_NAMES)}")
    settings = {key: value for key, value in asdict(conditions).items() if value not in (None, (), False)}
    record = parent_of(manifest, "filter", {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()})
    origin = manifest.provenance.model_copy(update={"parents": [record]})
    samples = None if conditions.keep == "rows" else manifest.samples
    return build(out, origin, samples, [(place, _fitting(place, conditions))], licence=licence)


def _fitting(place: Located, conditions: Conditions) -> Iterator[pa.RecordBatch]:
    verdicts, facts = VerdictIndex(place.verdicts), prompt_facts(place.prompts)
    for batch in iter_batches(place.rollouts):
        statuses, rewards = verdicts.lookup(batch["rollout_id"].to_pylist())
        starts = group_starts(batch)
        sizes = np.diff([*starts, batch.num_rows])
        prompts = [facts.get(name, UNKNOWN_PROMPT) for name in batch["prompt_id"].take(pa.array(starts)).to_pylist()]
        rates = np.array([_mean(part) for part in np.split(rewards, starts[1:])])
        groups = _groups_fit(conditions, prompts, np.split(rewards, starts[1:]), rates)
        frame = None
        if conditions.where is not None:
            frame = _frame(
                batch, statuses, rewards, np.repeat(rates, sizes), np.repeat(np.array(prompts, object), sizes)
            )
        rows = _rows_fit(conditions, batch, statuses, frame)
        if conditions.keep == "rows":
            groups = groups & np.logical_or.reduceat(rows, starts)
            chosen = rows & np.repeat(groups, sizes)
        else:
            reduce = np.logical_or if conditions.keep == "any" else np.logical_and
            chosen = np.repeat(groups & reduce.reduceat(rows, starts), sizes)
        if chosen.any():
            yield from split_groups(batch.filter(pa.array(chosen)))


def _mean(rewards: np.ndarray[Any, Any]) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(known.mean()) if len(known) else float("nan")


def _groups_fit(
    conditions: Conditions, prompts: list[PromptFacts], rewards: list[np.ndarray[Any, Any]], rates: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    fits = np.ones(len(prompts), bool)
    if conditions.min_pass_rate is not None:
        fits &= rates >= conditions.min_pass_rate  # a comparison with NaN is false: unjudged groups fail
    if conditions.max_pass_rate is not None:
        fits &= rates <= conditions.max_pass_rate
    if conditions.drop_uniform:
        fits &= np.array([len(np.unique(part[~np.isnan(part)])) > 1 for part in rewards], bool)
    if conditions.tasks:
        fits &= np.array([prompt.task in conditions.tasks for prompt in prompts], bool)
    return fits


def _rows_fit(
    conditions: Conditions, batch: pa.RecordBatch, statuses: np.ndarray[Any, Any], frame: Any | None
) -> np.ndarray[Any, Any]:
    fits = np.ones(batch.num_rows, bool)
    if conditions.statuses:
        fits &= np.isin(statuses, [STATUS_NAMES.index(status) for status in conditions.statuses])
    lengths = pc.list_value_length(batch["completion_tokens"]).to_numpy(zero_copy_only=False)
    if conditions.min_tokens is not None:
        fits &= lengths >= conditions.min_tokens
    if conditions.max_tokens is not None:
        fits &= lengths <= conditions.max_tokens
    if frame is not None and conditions.where is not None:
        fits &= _where(frame, conditions.where)
    return fits


def _frame(
    batch: pa.RecordBatch,
    statuses: np.ndarray[Any, Any],
    rewards: np.ndarray[Any, Any],
    rates: np.ndarray[Any, Any],
    prompts: np.ndarray[Any, Any],
) -> Any:
    import polars as pl

    frame: Any = pl.from_arrow(pa.Table.from_batches([batch]))
    return frame.with_columns(
        pl.Series("status", [STATUS_NAMES[code] for code in statuses.tolist()]),
        pl.Series("reward", rewards).fill_nan(None),
        pl.Series("pass_rate", rates).fill_nan(None),
        pl.col("completion_tokens").list.len().alias("tokens"),
        *(pl.Series(name, [getattr(prompt, name) for prompt in prompts]) for name in ("task", "source", "split")),
    )


def _where(frame: Any, condition: str) -> np.ndarray[Any, Any]:
    import polars as pl

    try:
        result = frame.select(pl.sql_expr(condition).alias("fits"))["fits"]
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"--where {condition!r}: {reason}; columns are {', '.join(frame.columns)}") from None
    if result.dtype != pl.Boolean or len(result) != len(frame):
        raise RequestError(f"--where {condition!r}: not a condition on a rollout (it gives {result.dtype})")
    return np.asarray(result.fill_null(False).to_numpy())


def merge_datasets(places: Sequence[Located], out: Path, *, licence: str = "unknown") -> dict[str, Any]:
    """Joins datasets; a group that several hold is taken once, from the first.

    Raises RequestError where tokenizers differ, and where two hold different samples of one group (the same prompt,
    snapshot and round): they would be one group, and have the same sample numbers.
    """
    if len(places) < 2:
        raise RequestError("merge: give at least two datasets")
    manifests = [read_manifest(place.rollouts) for place in places]
    first = manifests[0].provenance
    for place, manifest in zip(places, manifests, strict=True):
        theirs, ours = manifest.provenance.tokenizer_sha256[:12], first.tokenizer_sha256[:12]
        if manifest.provenance.tokenizer_sha256 != first.tokenizer_sha256:
            raise RequestError(
                f"{place.root}: made with another tokenizer than {places[0].root} ({theirs}, not {ours}), so the same "
                "ids mean other text; merge datasets of one tokenizer"
            )
    taken: dict[tuple[str, int, str], int] = {}

    def new_groups(place: Located) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(place.rollouts):
            for group in split_groups(batch):
                key, content = group_key(group), hash(tuple(sorted(group["rollout_id"].to_pylist())))
                if taken.setdefault(key, content) != content:
                    raise RequestError(
                        f"{place.root}: other samples of prompt {key[2]} (snapshot {key[0]}, round {key[1]}) than a "
                        "dataset before it; filter the prompt out of one of them"
                    )
                if key not in written:
                    written.add(key)
                    yield group

    written: set[tuple[str, int, str]] = set()
    samples = {manifest.samples for manifest in manifests}
    return build(
        out,
        _joined(manifests),
        samples.pop() if len(samples) == 1 else None,
        [(place, new_groups(place)) for place in places],
        licence=licence,
    )


def _joined(manifests: Sequence[Manifest]) -> Provenance:
    """One provenance out of several: what is common stays, what differs is `several`."""
    trees = [manifest.provenance.model_dump(mode="json") for manifest in manifests]
    same = {key: value for key, value in trees[0].items() if all(tree[key] == value for tree in trees)}
    joined = {key: same.get(key, SEVERAL) for key in trees[0]}
    sampling = [tree["sampling"] for tree in trees]
    keys = list(dict.fromkeys(key for one in sampling for key in one))
    joined["sampling"] = {
        key: sampling[0].get(key) if all(one.get(key) == sampling[0].get(key) for one in sampling) else SEVERAL
        for key in keys
    }
    foreign = [tree["imported"] for tree in trees if tree["imported"]]
    joined |= {
        "snapshot_step": max(tree["snapshot_step"] for tree in trees),
        "round": max(tree["round"] for tree in trees),
        "recipe": same.get("recipe"),
        "imported": {"format": SEVERAL, "retokenised": any(one.get("retokenised") for one in foreign)}
        if foreign
        else None,
        "parents": [parent_of(manifest, "merge") for manifest in manifests],
    }
    return Provenance.model_validate(joined)


def dedupe_dataset(place: Located, out: Path, *, by: str = "prompt", licence: str = "unknown") -> dict[str, Any]:
    """`by` "prompt": of several groups of a prompt, the one of the newest policy; "completion": of rows with the same
    prompt and the same tokens, the first (some 60 bytes of memory a row), which makes groups of several sizes."""
    manifest = read_manifest(place.rollouts)
    origin = manifest.provenance.model_copy(update={"parents": [parent_of(manifest, "dedupe", {"by": by})]})
    groups = _newest(place) if by == "prompt" else _distinct(place)
    return build(out, origin, manifest.samples if by == "prompt" else None, [(place, groups)], licence=licence)


def _newest(place: Located) -> Iterator[pa.RecordBatch]:
    newest: dict[str, tuple[int, int, str]] = {}
    columns = ["prompt_id", "snapshot_step", "round", "snapshot_id"]
    for batch in iter_batches(place.rollouts, columns):
        starts = pa.array(group_starts(batch))
        for prompt_id, *age in zip(*(batch[name].take(starts).to_pylist() for name in columns), strict=True):
            newest[prompt_id] = max(newest.get(prompt_id, (-1, -1, "")), (age[0], age[1], age[2]))
    for batch in iter_batches(place.rollouts):
        for group in split_groups(batch):
            if newest[group["prompt_id"][0].as_py()] == tuple(group[name][0].as_py() for name in columns[1:]):
                yield group


def _distinct(place: Located) -> Iterator[pa.RecordBatch]:
    seen: set[bytes] = set()
    for batch in iter_batches(place.rollouts):
        for group in split_groups(batch):
            prompt = group["prompt_id"][0].as_py().encode()
            new = []
            for row, tokens in enumerate(group["completion_tokens"]):
                values = tokens.values.to_numpy().tobytes()
                digest = hashlib.blake2b(prompt + b"\0" + values, digest_size=12).digest()
                if digest not in seen:
                    seen.add(digest)
                    new.append(row)
            if new:
                yield group.take(pa.array(new))


def split_dataset(
    place: Located, out: Path, *, share: float, seed: int = 0, licence: str = "unknown"
) -> dict[str, dict[str, Any]]:
    """Writes `out`/train and `out`/heldout, split by the prompts' text; returns the numbers of each.

    Prompts with the same messages stay together, even where their references or ids differ. Raises RequestError where
    one side would be empty.
    """
    heldout = _heldout(place, share, seed)
    manifest = read_manifest(place.rollouts)
    results = {}
    if Path(out).exists() and any(Path(out).iterdir()):
        raise RequestError(f"{out}: is not empty; choose another folder")
    for name, inside in (("train", False), ("heldout", True)):
        settings = {"part": name, "share": share, "seed": seed}
        origin = manifest.provenance.model_copy(update={"parents": [parent_of(manifest, "split", settings)]})
        groups = (
            group
            for batch in iter_batches(place.rollouts)
            for group in split_groups(batch)
            if (group["prompt_id"][0].as_py() in heldout) is inside
        )
        results[name] = build(
            Path(out) / name, origin, manifest.samples, [(place, groups)], licence=licence, split_name=name
        )
    return results


def _heldout(place: Located, share: float, seed: int) -> set[str]:
    """prompt_ids of the held-out share: those whose text has the least hash with this seed."""
    used = {key for batch in iter_batches(place.rollouts, ["prompt_id"]) for key in batch["prompt_id"].to_pylist()}
    texts: dict[bytes, list[str]] = {}
    for batch in prompt_batches(place.prompts, ["prompt_id", "messages"]):
        for prompt_id, messages in zip(batch["prompt_id"].to_pylist(), batch["messages"].to_pylist(), strict=True):
            if prompt_id in used:
                text = "\0".join(f"{message['role']}\0{' '.join(message['content'].split())}" for message in messages)
                texts.setdefault(hashlib.sha256(f"{seed}\0{text}".encode()).digest(), []).append(prompt_id)
                used.discard(prompt_id)
    if used:
        raise RequestError(f"{place.root}: {len(used)} prompts are missing, so the split can't keep texts together")
    count = round(share * len(texts))
    if not 0 < count < len(texts):
        raise RequestError(
            f"{place.root}: {count} of {len(texts)} prompts held out leaves one side empty; change --heldout"
        )
    return {prompt_id for text in sorted(texts)[:count] for prompt_id in texts[text]}


def build(
    out: Path,
    origin: Provenance,
    samples: int | None,
    sources: Sequence[Source],
    *,
    licence: str,
    split_name: str | None = None,
) -> dict[str, Any]:
    """Writes an exported dataset of the sources' groups, their prompts and their verdicts; returns its numbers."""
    with new_folder(out) as folder:
        prompts: set[str] = set()
        kept: list[np.ndarray[Any, Any]] = []
        with RolloutWriter(folder / ROLLOUTS, origin, samples=samples) as writer:
            for _, groups in sources:
                keys = [np.zeros(0, np.uint64)]
                for group in groups:
                    # A view would keep the whole row group it was cut from in memory until the shard is written.
                    writer.add_batch(group.take(pa.array(range(group.num_rows), pa.int32())))
                    prompts.add(group["prompt_id"][0].as_py())
                    keys.append(key64(group["rollout_id"].to_pylist()))
                kept.append(np.sort(np.concatenate(keys)))
        (folder / ROLLOUTS / ".lock").unlink()
        if not prompts:
            raise RequestError(f"{out}: no group is left; loosen the conditions")
        _write_prompts(folder / PROMPTS, [place for place, _ in sources], prompts, split_name)
        for number, (place, _) in enumerate(sources):
            _write_verdicts(place, folder / VERDICTS, kept[number], f"{number}-" if len(sources) > 1 else "")
        return describe(folder, licence, None)


def _write_prompts(path: Path, places: Sequence[Located], wanted: set[str], split_name: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"oapl.schema_version": str(schema.SCHEMA_VERSION), "oapl.table": "prompts"}
    left = set(wanted)
    with pq.ParquetWriter(path, schema.PROMPTS.with_metadata(metadata), compression="zstd") as writer:
        for place in places:
            for batch in prompt_batches(place.prompts):
                chosen = []
                for row, prompt_id in enumerate(batch["prompt_id"].to_pylist()):
                    if prompt_id in left:
                        left.discard(prompt_id)
                        chosen.append(row)
                if not chosen:
                    continue
                part = batch.take(pa.array(chosen))
                if split_name is not None:
                    column = pa.array([split_name] * part.num_rows, pa.string())
                    part = part.set_column(part.schema.get_field_index("split"), schema.PROMPTS.field("split"), column)
                writer.write_batch(part)


def _write_verdicts(place: Located, folder: Path, keys: np.ndarray[Any, Any], prefix: str) -> None:
    written = []
    metadata = {"oapl.schema_version": str(schema.SCHEMA_VERSION), "oapl.table": "verdicts"}
    for path in verdict_files(place.verdicts):
        folder.mkdir(exist_ok=True)
        written.append(folder / f"{prefix}{path.name}")
        with pq.ParquetWriter(written[-1], schema.VERDICTS.with_metadata(metadata), compression="zstd") as writer:
            for batch in parquet_batches(path, None, schema.VERDICTS):
                inside = np.isin(key64(batch["rollout_id"].to_pylist()), keys)
                writer.write_batch(batch.filter(pa.array(inside)))
    keep_order(written)
