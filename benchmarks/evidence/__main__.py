"""What stands behind docs/evidence.md: the comparisons, pass@k for large k, and the pictures and tables of both.

python -m benchmarks.evidence run [quick | tune | lags | ...]   comparisons, see experiments.py; without a name all
                              [--jobs N]                        so many at a time, which share the cores
python -m benchmarks.evidence passk [--seeds 0,1,2]             evaluates snapshots of data/compare/lags anew
python -m benchmarks.evidence report                            measurements below data/compare -> docs/evidence/
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.evidence import experiments, pictures, tables

COMPARED = Path(experiments.COMPARED)
OUT = Path("docs/evidence")
KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POLICIES = ("start", "oapl", "grpo")


def run(names: list[str], jobs: int) -> None:
    """Runs the comparisons, and says the words of each, which can be given by hand as well.

    `jobs` of them at a time, which share the cores; one that uses what an earlier one fills waits for it.
    """
    waiting = [words for name in names for words in experiments.EXPERIMENTS[name]()]
    running: dict[Future[None], list[str]] = {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            before = list(running.values())
            for words in list(waiting):
                if len(running) < jobs and not any(experiments.hinders(earlier, words) for earlier in before):
                    running[pool.submit(_compare, words, threads)] = words
                    waiting.remove(words)
                before.append(words)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                del running[one]
                one.result()


def _compare(words: list[str], environment: dict[str, str]) -> None:
    started = time.monotonic()
    print(f"$ {shlex.join(['oapl', 'compare', *words])}", flush=True)
    command = [sys.executable, "-m", "pipeline.cli", "compare", *words]
    subprocess.run(command, check=True, env=os.environ | environment)
    print(f"{time.monotonic() - started:.0f} s: oapl compare {shlex.join(words)}", flush=True)


def passk(seeds: list[int], lag: int) -> None:
    """pass@k for k up to 256 of the start and of what each loss made of it; what is there is not done again."""
    from pipeline.layout import Run
    from pipeline.policies import snapshots

    for seed in seeds:
        prompts = Run(COMPARED / "lags", f"start-lag{lag}-seed{seed}").prompts
        for name in POLICIES:
            out = COMPARED / "passk" / f"{name}-lag{lag}-seed{seed}.parquet"
            if out.exists():
                continue
            run = Run(COMPARED / "lags", f"start-seed{seed}" if name == "start" else f"{name}-lag{lag}-seed{seed}")
            newest = snapshots.newest(run, None if name == "start" else 0)
            if newest is None:
                sys.exit(f"{run.path}: no snapshot here; run `python -m benchmarks.evidence run lags` first")
            words = ["--recipe", "tiny", "--set", f"seed={seed}", "--policy", run.snapshot(newest.snapshot_id)]
            words += ["--prompts", prompts, "--samples", KS[-1], "--ks", ",".join(map(str, KS)), "--out", out]
            subprocess.run([sys.executable, "-m", "pipeline.cli", "evaluate", *map(str, words)], check=True)


def report() -> None:
    """Keeps the measurements, draws what there is, and prints the tables."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, table in tables.gather(COMPARED).items():
        table.write_parquet(OUT / f"{name}.parquet", compression="zstd")
    kept = tables.kept(OUT)
    for place in pictures.draw(kept, OUT):
        print(place)
    print(tables.summary(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "passk", "report"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(experiments.EXPERIMENTS)}")
    parser.add_argument("--seeds", default=experiments.SEEDS)
    parser.add_argument("--lag", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(experiments.EXPERIMENTS)
    if unknown:
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    try:
        if arguments.what == "run":
            run(arguments.names or list(experiments.ALL), max(1, arguments.jobs))
        elif arguments.what == "passk":
            passk([int(seed) for seed in arguments.seeds.split(",")], arguments.lag)
        else:
            report()
    except subprocess.CalledProcessError as error:  # its own line is on the terminal already
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
