"""A dataset written in another project's columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.rollouts.groups import split_groups
from pipeline.rollouts.locate import EXTRAS, Located
from pipeline.rollouts.store import iter_batches
from pipeline.rollouts.tables import PromptShelf, VerdictIndex
from pipeline.sharing.exchange.form import Form
from pipeline.sharing.exchange.forms import FORMS
from pipeline.storage import durable


def export_foreign(place: Located, out: Path, form: str) -> int:
    """Writes one Parquet (or JSON lines) file in another project's columns; returns the rollouts written.

    Without a reward a rollout can't be told in the official and verl columns: its group goes out with null there.
    """
    if place.prompts is None:
        raise RequestError(f"{place.root}: no prompts beside the rollouts; they are a part of this format")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already; choose another name")
    rows = 0
    with durable.told_in_one_line(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.rmdir()
        with (
            durable.replacing(out) as temporary,
            _Sink(temporary, FORMS[form]) as sink,
            PromptShelf(place.prompts) as prompts,
        ):
            for prompt, rollouts in _samples(place, prompts):
                sink.write(FORMS[form].rows(prompt, rollouts))
                rows += len(rollouts)
    return rows


def _samples(place: Located, shelf: PromptShelf) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Groups: the prompt's row, with what its file of origin said under `extras`, and rollouts with their reward."""
    verdicts = VerdictIndex(place.verdicts)
    kept = place.root / EXTRAS
    extras = {row["prompt_id"]: row for row in pq.read_table(kept).to_pylist()} if kept.is_file() else {}
    index = 0
    for batch in iter_batches(place.rollouts):
        for group in split_groups(batch):
            rows = group.to_pylist()
            _, rewards = verdicts.lookup(row["rollout_id"] for row in rows)
            for row, reward in zip(rows, rewards.tolist(), strict=True):
                row["reward"] = None if math.isnan(reward) else reward
            prompt = shelf.find(rows[0]["prompt_id"])
            if prompt is None:
                name = rows[0]["prompt_id"]
                raise RequestError(f"{place.root}: prompt {name} is missing; run `oapl rollouts validate`")
            split = "test" if prompt["split"] == "heldout" else "train"
            plain = {"ability": prompt["task"], "style": "rule", "split": split, "index": index}
            prompt["extras"] = extras.get(prompt["prompt_id"], plain)
            yield prompt, rows
            index += 1


class _Sink:
    def __init__(self, path: Path, form: Form) -> None:
        self._schema = form.schema
        self._lines = path.open("w", encoding="utf-8") if form.lines else None
        self._writer = None if self._lines else pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._rows += rows
        if len(self._rows) >= 1024:
            self._flush()

    def _flush(self) -> None:
        if self._lines is not None:
            self._lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        elif self._writer is not None:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        for sink in (self._lines, self._writer):
            if sink is not None:
                sink.close()
