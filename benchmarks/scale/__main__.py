"""Does a rollout cost the same whether it is the first or the ten millionth? `python -m benchmarks.scale [options]`

Simulated replicas (up to 256, in processes of their own, each with a real ShardWriter) fill one dataset, at some rate
they die and others make their groups again; this process is the real driver, which lists what they record. Lengths are
drawn from a log-normal distribution, or from a run's (--run), and are scaled down to --tokens, so that it is the
store that is measured and not the disk. Each line of the table is a size that the one growing dataset passes:

  seconds        wall-clock since the start, and `upkeep`: of those, in listing, records and manifest
  driver MiB     resident memory of the driver above what it had before the first record

Then: validation that each group is there once, opening the dataset again, and the scorer's spool.
--paper N makes no shards but only their records, N rollouts' worth, for the real ledger.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scale.replicas import Load, lengths_of, log_normal, prompt_name, provenance, shares, site
from pipeline.errors import WorkError
from pipeline.rollouts import places
from pipeline.rollouts.ledger import COMMITS, Ledger, Record
from pipeline.rollouts.manifest import MANIFEST, Shard, identity
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest

PAPER_RECORDS = 64
"""That a manifest takes in, on paper."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What was measured when the dataset passed a size."""

    rollouts: int
    shards: int
    seconds: float
    upkeep: float
    cpu: float
    """Processor seconds of the driver."""
    mib: float
    manifest_bytes: int


class Watch:
    """Takes a Mark at each size that is passed."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._left = sorted(sizes)
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._before = psutil.Process().memory_info().rss
        self._peak = self._before
        self.marks: list[Mark] = []

    def look(self, ledger: Ledger, folder: Path) -> None:
        self._peak = max(self._peak, psutil.Process().memory_info().rss)
        manifest = ledger.manifest
        if self._left and manifest.rows >= self._left[0]:
            self._left = [size for size in self._left if size > manifest.rows]
            self.marks.append(
                Mark(
                    manifest.rows,
                    len(manifest.shards),
                    time.perf_counter() - self._began,
                    ledger.pace.spent,
                    time.process_time() - self._cpu,
                    (self._peak - self._before) / 2**20,
                    (folder / MANIFEST).stat().st_size,
                )
            )


def table(title: str, marks: list[Mark]) -> None:
    print(f"\n{title}\n  rollouts   shards   seconds  rollouts/s  upkeep s  driver CPU s  driver MiB  manifest bytes")
    for m in marks:
        print(
            f"{m.rollouts:10,} {m.shards:8,} {m.seconds:9.1f} {m.rollouts / m.seconds:11,.0f} {m.upkeep:9.2f} "
            f"{m.cpu:13.1f} {m.mib:11.1f} {m.manifest_bytes:15,}"
        )


def fill(folder: Path, options: argparse.Namespace, load: Load) -> list[Mark]:
    """The growing dataset, under load."""
    groups = max(options.sizes) // options.samples
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with RolloutWriter(folder, provenance(options.samples), samples=options.samples, shared=True) as writer:
        per_site = zip(shares(options.replicas, options.processes), shares(groups, options.processes), strict=True)
        sites = [
            context.Process(target=site, args=(load, f"site{n}", high - low, first, last, results))
            for n, ((low, high), (first, last)) in enumerate(per_site)
        ]
        for one in sites:
            one.start()
        watch = Watch(options.sizes)
        while any(one.is_alive() for one in sites):
            writer.adopt()
            watch.look(writer._ledger, folder)
            time.sleep(0.01)
        ended = [results.get(timeout=10) for one in sites if one.exitcode == 0]
        writer.adopt(now=True)
        watch.look(writer._ledger, folder)
        if len(ended) < len(sites) or len(writer.committed) != groups:
            raise WorkError(f"{folder}: {len(writer.committed)} of {groups} groups are there: a replica process failed")
    deaths, lost, doubled = (sum(numbers) for numbers in zip(*ended, strict=True))
    print(f"{deaths} replicas died; {lost} groups were made again, {doubled} of them had been recorded after all")
    return watch.marks


def after(folder: Path, options: argparse.Namespace) -> None:
    """Each group once; opening again; what judging keeps for each rollout."""
    from pipeline.rollouts.keys import Keys
    from pipeline.rollouts.tables import key64
    from pipeline.verifiers.cases import Verdict
    from pipeline.verifiers.spool import Spool

    rows = read_manifest(folder).rows
    began, seen = time.perf_counter(), Keys()
    for batch in iter_batches(folder, ["rollout_id"]):
        seen.update(key64(batch[0].to_pylist()))
    if len(seen) != rows:
        raise WorkError(f"{folder}: {rows} rows and {len(seen)} different rollout_ids")
    print(f"read: {rows:,} rollout_ids, each once, {rows / (time.perf_counter() - began):,.0f}/s")
    began, before = time.perf_counter(), psutil.Process().memory_info().rss
    with RolloutWriter(folder, provenance(options.samples), samples=options.samples) as writer:
        seconds, grown = time.perf_counter() - began, psutil.Process().memory_info().rss - before
        print(f"opened again: {len(writer.committed):,} groups known in {seconds:.1f} s, {grown / 2**20:.1f} MiB more")
    began, before = time.perf_counter(), psutil.Process().memory_info().rss
    with Spool(folder / ".spool") as spool:
        for number in range(rows):
            spool.add(Verdict(str(number), "fake", "1", "correct", 1.0, "", 1.0, "none"))
        count = sum(1 for _ in spool.in_order())
    seconds, grown = time.perf_counter() - began, psutil.Process().memory_info().rss - before
    print(f"spool of verdicts: {count / seconds:,.0f}/s in and out, {grown / 2**20:.1f} MiB for {count:,}")


class PaperFolder(places.Folder):
    """Shards that its records tell of are taken to be there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.told: dict[str, int] = {}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.told[name] for name in names if name in self.told}


def paper(folder: Path, options: argparse.Namespace) -> list[Mark]:
    """The real ledger and real records of --paper rollouts in shards of --paper-shard-rows, and no shard."""
    origin, place = provenance(options.samples), PaperFolder(folder)
    place.prepare()

    def rewrite(file: str, name: str, without: set[str]) -> Shard:
        raise AssertionError("no group comes twice here")

    with place.lock():
        ledger = Ledger(place, origin, options.samples, True, rewrite)
        sizes = [
            10**exponent * factor
            for exponent in range(4, 8)
            for factor in (1, 3)
            if 10**exponent * factor <= options.paper
        ]
        watch = Watch([*sizes, options.paper] if options.paper not in sizes else sizes)
        for number, record in enumerate(_records(options, identity(origin, options.samples)), 1):
            place.told[record.shard.file] = record.shard.bytes
            name = record.shard.file.removeprefix("part-").removesuffix(".parquet")
            # Not made durable: it is the driver's work that is measured here.
            (folder / COMMITS / f"{name}.json").write_text(record.model_dump_json())
            # Records come far faster than replicas make them; so often a manifest, whatever its share of this time.
            ledger.adopt(now=number % PAPER_RECORDS == 0)
            watch.look(ledger, folder)
        ledger.adopt(now=True)
        watch.look(ledger, folder)
    return watch.marks


def _records(options: argparse.Namespace, settings: str) -> Iterator[Record]:
    per_shard = options.paper_shard_rows // options.samples
    groups = options.paper // options.samples
    for number, first in enumerate(range(0, groups, per_shard)):
        ids = [prompt_name(group) for group in range(first, min(first + per_shard, groups))]
        rows = len(ids) * options.samples
        file = f"part-000001-paper-00000000-{number:05d}.parquet"
        shard = Shard(file=file, rows=rows, groups=len(ids), bytes=10**8, sha256="0" * 64, tokens=rows * 1000)
        yield Record(epoch=1, identity=settings, shard=shard, prompt_ids=ids)


def joined(file: Path, measured: list[Mark], on_paper: list[Mark]) -> tuple[list[Mark], list[Mark]]:
    """What this run measured, and of what it did not measure what the file has; the file has both afterwards."""
    old = json.loads(file.read_text()) if file.exists() else {"measured": [], "on_paper": []}
    measured = measured or [Mark(**mark) for mark in old["measured"]]
    on_paper = on_paper or [Mark(**mark) for mark in old["on_paper"]]
    file.write_text(json.dumps({"measured": [*map(asdict, measured)], "on_paper": [*map(asdict, on_paper)]}, indent=1))
    return measured, on_paper


def draw(out: Path, measured: list[Mark], on_paper: list[Mark]) -> None:
    """Time, memory and manifest by rollouts; a line of slope one is what linear means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pipeline.plots import COLOURS, FAINT, WIDTH, plain

    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    titles = ("Seconds, and a line of slope one", "Driver's memory above its start, MiB", "Manifest, bytes")
    names = ("seconds", "mib", "manifest_bytes")
    series = [("shards and all", measured), ("ledger alone, on paper", on_paper)]
    for axis, title, name in zip(panels, titles, names, strict=True):
        for colour, (label, marks) in zip(COLOURS, series, strict=False):
            if marks:
                x = [mark.rollouts for mark in marks]
                y = [getattr(mark, name) for mark in marks]
                axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
                if name == "seconds":
                    line = [y[-1] * value / x[-1] for value in x]
                    axis.plot(x, line, color=colour, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        if name != "mib":
            axis.set_yscale("log")
        plain(axis, title)
        axis.set_xlabel("rollouts in the manifest", fontsize=8, color=FAINT)
    panels[1].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=110)
    print(f"\n{out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2, help="that the replicas are spread over")
    parser.add_argument("--slots", type=int, default=4, help="groups in a replica's engine at a time")
    parser.add_argument("--shard-rows", type=int, default=512)
    parser.add_argument("--failures", type=float, default=1e-3, help="deaths of a replica for each group made")
    parser.add_argument("--median", type=float, default=4000, help="of the log-normal lengths, in tokens")
    parser.add_argument("--sigma", type=float, default=0.8)
    parser.add_argument("--longest", type=int, default=32_768)
    parser.add_argument("--run", type=Path, help="a run's folder, whose lengths are drawn from instead")
    parser.add_argument("--tokens", type=int, default=12, help="mean length of what is stored")
    parser.add_argument("--paper", type=int, default=10**7, help="rollouts of the ledger alone; 0: none")
    parser.add_argument("--paper-shard-rows", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where to write, and leave, the dataset; else a temporary folder")
    parser.add_argument("--marks", type=Path, help="JSON of what was measured, which several runs fill for one picture")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args()
    lengths = lengths_of(options.run) if options.run else log_normal(options.median, options.sigma, options.longest)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f} at the start; {asdict_of(options)}")
    place = options.folder or Path(tempfile.mkdtemp(prefix="oapl-scale-"))
    try:
        on_paper = paper(place / "paper", options) if options.paper else []
        if on_paper:
            table("The ledger alone, records without shards", on_paper)
        load = Load(
            str(place / "rollouts"), options.samples, options.shard_rows, options.slots, options.failures, lengths,
            options.tokens,
        )  # fmt: skip
        measured = fill(place / "rollouts", options, load) if max(options.sizes) else []
        if measured:
            table("Shards and all", measured)
            after(place / "rollouts", options)
        if options.marks:
            measured, on_paper = joined(options.marks, measured, on_paper)
        if options.picture:
            draw(options.picture, measured, on_paper)
    finally:
        if options.folder is None:
            shutil.rmtree(place)


def asdict_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("folder", "picture", "marks")}


if __name__ == "__main__":
    main()
