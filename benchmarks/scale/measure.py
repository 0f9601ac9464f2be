"""Does a rollout cost the same whether it is the first or the ten millionth? `python -m benchmarks.scale [options]`

Simulated replicas (up to 256, in two processes, each with a real ShardWriter) fill a dataset of each of --sizes; at
some rate they die and others make their groups again; the real driver lists what they record. Lengths are drawn from
a log-normal distribution, or from a run's (--run), and are scaled down to --tokens, so that it is the store that is
measured and not the disk. A line of the table is a dataset:

  seconds        wall-clock since the start, and `upkeep`: of those, in listing, records and manifest
  driver MiB     resident memory of the driver above what it had before the first record

Then, of the largest: that each rollout is there once, opening it again, and judging the first so many of it.
--paper N is N rollouts by the real scheduler on as many simulated replicas, on a clock of their own: they die at the
rate at which machines do, some are slow, and they put records without shards. `driver CPU s` is without the simulation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scale.crew import Cluster, TimedCrew
from benchmarks.scale.replicas import Load, lengths_of, log_normal, made_group, prompt_name, provenance, shares, site
from pipeline.errors import WorkError
from pipeline.generation.fleet import Fleet
from pipeline.prompts.files import Prompt, write_prompts
from pipeline.recipe import Generation, Verification
from pipeline.rollouts.ledger import Ledger
from pipeline.rollouts.manifest import MANIFEST, Shard, identity
from pipeline.rollouts.store import RolloutWriter, iter_batches, read_manifest
from pipeline.scoring.score import score
from pipeline.storage import places

INTERRUPTIONS = 419 / (54 * 24 * 16384)
"""Of a card in an hour, unexpected: 419 in 54 days on 16,384 H100 (The Llama 3 Herd of Models, section 3.3.4)."""


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

    def __init__(self, sizes: Iterable[int], without: TimedCrew | None = None) -> None:
        """`without`: what runs in this process and is no part of the driver."""
        self._left, self._without = sorted(sizes), without
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
                    time.process_time() - self._cpu - (self._without.cpu if self._without else 0.0),
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


def alone(function: Callable[..., list[Mark]], *arguments: object) -> list[Mark]:
    """What it returns, called in a process of its own, whose memory is not that of what ran before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fill(folder: Path, size: int, options: argparse.Namespace, load: Load) -> list[Mark]:
    """A dataset of so many rollouts, from its first record to its last."""
    groups = size // options.samples
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
        warm_up(folder.with_name("warm"), options.samples)
        watch = Watch([groups * options.samples])
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


def warm_up(folder: Path, samples: int) -> None:
    """Has Parquet written and read, as for a shard that comes twice: its libraries' buffers are no growth."""
    with RolloutWriter(folder, provenance(samples), samples=samples) as writer:
        for number in range(64):
            writer.add_group(made_group(number, [12] * samples, [1] * 12, [-1.0] * 12))
    for batch in iter_batches(folder):
        assert batch.num_rows
    shutil.rmtree(folder)


def after(folder: Path, options: argparse.Namespace) -> None:
    """Each rollout once; opening again."""
    from pipeline.rollouts.keys import Keys
    from pipeline.rollouts.tables import key64

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


def judged(folder: Path, options: argparse.Namespace) -> None:
    """The real scorer and math verifier on the first shards of the dataset, up to each size."""
    print("\nJudging\n  rollouts   seconds  rollouts/s  MiB above its start")
    for size in options.sizes:
        part = _first(folder, size)
        rows = read_manifest(part).rows
        before = peak = psutil.Process().memory_info().rss

        def look(done: int, total: int) -> None:
            nonlocal peak
            if done % 1000 == 0:
                peak = max(peak, psutil.Process().memory_info().rss)

        began = time.perf_counter()
        found = score(part, part / "prompts.parquet", part / "verdicts", Verification(), look)
        seconds = time.perf_counter() - began
        if found.statuses != {"correct": rows // options.samples, "wrong": rows - rows // options.samples}:
            raise WorkError(f"{part}: {found.statuses}: one of each group's {options.samples} answers is right")
        print(f"{rows:10,} {seconds:9.1f} {rows / seconds:11,.0f} {(peak - before) / 2**20:20.1f}")
        shutil.rmtree(part)


def _first(folder: Path, rows: int) -> Path:
    """A dataset of the folder's first shards that hold so many rows, with its prompts."""
    part = folder.with_name(f"first-{rows}")
    part.mkdir()
    manifest, shards = read_manifest(folder), []
    while sum(shard.rows for shard in shards) < rows:
        shards.append(manifest.shards[len(shards)])
        os.link(folder / shards[-1].file, part / shards[-1].file)
    manifest.model_copy(update={"shards": [], "rows": 0, "groups": 0, "tokens": 0}).with_shards(shards).save(part)
    ids = (one for batch in iter_batches(part, ["prompt_id"]) for one in dict.fromkeys(batch[0].to_pylist()))
    prompts = (Prompt(one, "math", "simulated", "train", (("user", "Which?"),), "3") for one in ids)
    write_prompts(part / "prompts.parquet", prompts)
    return part


class PaperFolder(places.Folder):
    """Shards are taken to be there, in the size that their records tell: as many bytes as rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.told: dict[str, int] = {}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.told.pop(name) for name in names if name in self.told}  # asked once of each

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        found = super().read_many(names)
        for data in found.values():
            shard = json.loads(data)["shard"]
            self.told[shard["file"]] = shard["bytes"]
        return found


class PaperWriter:
    """What the scheduler asks of a RolloutWriter, over the real ledger."""

    def __init__(self, ledger: Ledger, watch: Watch, folder: Path) -> None:
        self._ledger, self._watch, self._folder = ledger, watch, folder
        self.committed = ledger.committed

    def adopt(self, *, now: bool = False) -> list[str]:
        found = self._ledger.adopt(now=now)
        self._watch.look(self._ledger, self._folder)
        return found


class Count:
    """What the scheduler counts for the one who waits."""

    done = tokens = 0

    def add(self, count: int, tokens: int = 0) -> None:
        self.done += count
        self.tokens += tokens


def paper(folder: Path, options: argparse.Namespace, lengths: tuple[int, ...]) -> list[Mark]:
    """The real scheduler, ledger and records of --paper rollouts on simulated replicas, and no shards."""
    origin, place = provenance(options.samples), PaperFolder(folder)
    place.prepare()
    groups = options.paper // options.samples
    told = Cluster(
        replicas=options.replicas,
        slots=options.sequences,
        samples=options.samples,
        shard_rows=options.paper_shard_rows,
        tokens_per_s=options.pace,
        deaths_per_hour=options.deaths,
        slow=options.slow,
        lengths=lengths,
        identity=identity(origin, options.samples),
        folder=folder,
    )

    def rewrite(file: str, name: str, without: set[str]) -> Shard:
        raise AssertionError("a dead replica's records are whole or not there")

    with place.lock():
        ledger = Ledger(place, origin, options.samples, True, rewrite)
        crew, count = TimedCrew(told), Count()
        watch = Watch(powers(options.paper), without=crew)
        writer = PaperWriter(ledger, watch, folder)
        settings = Generation(samples=options.samples, max_num_seqs=options.sequences)
        prompts = (Prompt(prompt_name(n), "math", "simulated", "train", (), None, None) for n in range(groups))
        fleet = Fleet(crew, settings, prompts, groups, writer, count)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            fleet.run()
        fleet.stop()
        writer.adopt(now=True)
    if len(ledger.committed) != groups or ledger.manifest.rows != count.done:
        raise WorkError(f"{folder}: {len(ledger.committed)} of {groups} groups, {count.done} rollouts were counted")
    share = count.tokens / (options.replicas * options.sequences * options.pace * crew.now())
    again = sum(int(line.split("; ")[1].split()[0]) for line in said.getvalue().splitlines())
    print(
        f"{options.replicas} replicas for {crew.now() / 3600:.1f} h, {share:.0%} of what they could make: "
        f"{crew.heard:,} reports, {crew.records:,} records, "
        f"{crew.deaths} replicas lost, {again:,} groups given to others; the simulation took {crew.seconds:.0f} s"
    )
    return watch.marks


def powers(most: int) -> list[int]:
    """10,000, 30,000, 100,000, ... up to the number."""
    exponents = range(4, len(str(most)))
    return [size for exponent in exponents for size in (10**exponent, 3 * 10**exponent) if size < most] + [most]


def draw(out: Path, measured: list[Mark], on_paper: list[Mark]) -> None:
    """Time, processor time and memory by rollouts; a line of slope one is what linear means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pipeline.evaluation.plots import COLOURS, FAINT, WIDTH, plain

    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    series = [("shards and all", measured), ("simulated replicas, no shards", on_paper)]
    panels_of: list[tuple[str, Callable[[Mark], float]]] = [
        ("Seconds, and a line of slope one", lambda mark: mark.seconds),
        ("Driver's processor time, µs a rollout", lambda mark: mark.cpu / mark.rollouts * 1e6),
        ("Driver's memory above its start, MiB", lambda mark: mark.mib),
    ]
    for axis, (title, value) in zip(panels, panels_of, strict=True):
        for colour, (label, marks) in zip(COLOURS, series, strict=False):
            if not marks:
                continue
            x, y = [mark.rollouts for mark in marks], [value(mark) for mark in marks]
            axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
            if axis is panels[0]:
                axis.plot(x, [y[-1] * at / x[-1] for at in x], color=colour, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.minorticks_off()
        plain(axis, title)
        axis.set_xlabel("rollouts in the manifest", fontsize=8, color=FAINT)
    panels[0].set_yscale("log")
    for axis in panels[1:]:
        axis.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=110)
    print(f"\n{out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="0: none")
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
    parser.add_argument("--paper", type=int, default=10**6, help="rollouts on simulated replicas; 0: none")
    parser.add_argument("--paper-shard-rows", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=128, help="that a simulated engine decodes at a time")
    parser.add_argument("--pace", type=float, default=30.0, help="tokens a second of each")
    parser.add_argument("--deaths", type=float, default=8 * INTERRUPTIONS, help="of a simulated replica in an hour")
    parser.add_argument("--slow", type=float, default=0.01, help="share of replicas that are six times as slow")
    parser.add_argument("--folder", type=Path, help="where to write, and leave, the dataset; else a temporary folder")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args()
    options.sizes = sorted(filter(None, options.sizes))
    lengths = lengths_of(options.run) if options.run else log_normal(options.median, options.sigma, options.longest)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f} at the start; {asdict_of(options)}")
    place = options.folder or Path(tempfile.mkdtemp(prefix="oapl-scale-"))
    try:
        load = Load(
            str(place / "rollouts"), options.samples, options.shard_rows, options.slots, options.failures, lengths,
            options.tokens,
        )  # fmt: skip
        measured = []
        for size in options.sizes:
            shutil.rmtree(place / "rollouts", ignore_errors=True)
            measured += alone(fill, place / "rollouts", size, options, load)
        if measured:
            table("Shards and all", measured)
            after(place / "rollouts", options)
            judged(place / "rollouts", options)
        on_paper = alone(paper, place / "paper", options, lengths) if options.paper else []
        if on_paper:
            table("Scheduler and ledger on simulated replicas, records without shards", on_paper)
        if options.picture:
            draw(options.picture, measured, on_paper)
    finally:
        if options.folder is None:
            shutil.rmtree(place)


def asdict_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("folder", "picture")}
