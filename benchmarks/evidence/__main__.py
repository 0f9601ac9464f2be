"""What stands behind docs/evidence.md: the comparisons, pass@k for large k, and the pictures and tables of both.

python -m benchmarks.evidence run [quick | tune | lags | ...]   comparisons, see experiments.py; without a name all
python -m benchmarks.evidence passk [--seeds 0,1,2]             evaluates snapshots of data/compare/lags anew
python -m benchmarks.evidence report                            measurements below data/compare -> docs/evidence/
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.evidence import experiments, pictures, tables

COMPARED = Path(experiments.COMPARED)
OUT = Path("docs/evidence")
KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POLICIES = ("start", "oapl", "grpo")


def run(names: list[str]) -> None:
    """Runs the comparisons one after another, and says the words of each, which can be given by hand as well."""
    for name in names:
        for words in experiments.EXPERIMENTS[name]():
            print(f"$ {shlex.join(['oapl', 'compare', *words])}", flush=True)
            subprocess.run([sys.executable, "-m", "pipeline.cli", "compare", *words], check=True)


def passk(seeds: list[int], lag: int) -> None:
    """pass@k for k up to 256 of the start and of what each loss made of it; what is there is not done again."""
    from pipeline import snapshots
    from pipeline.layout import Run

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
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(experiments.EXPERIMENTS)
    if unknown:
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    try:
        if arguments.what == "run":
            run(arguments.names or list(experiments.ALL))
        elif arguments.what == "passk":
            passk([int(seed) for seed in arguments.seeds.split(",")], arguments.lag)
        else:
            report()
    except subprocess.CalledProcessError as error:  # its own line is on the terminal already
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
