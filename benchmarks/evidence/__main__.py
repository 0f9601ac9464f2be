"""What `make evidence` does besides `oapl compare`: pass@k for large k; pictures and tables of docs/evidence.md.

python -m benchmarks.evidence passk [--seeds 0,1,2]      evaluates snapshots of data/compare/lags anew
python -m benchmarks.evidence report                     data/compare/*/measurements.parquet -> docs/evidence/
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.evidence import pictures, tables

COMPARED = Path("data/compare")
OUT = Path("docs/evidence")
KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POLICIES = ("start", "oapl", "grpo")


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
            assert newest is not None, f"{run.path} has no snapshot: run `make evidence-lags` first"
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
    parser.add_argument("what", choices=["passk", "report"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lag", type=int, default=400)
    arguments = parser.parse_args()
    if arguments.what == "passk":
        passk([int(seed) for seed in arguments.seeds.split(",")], arguments.lag)
    else:
        report()


if __name__ == "__main__":
    main()
