"""Writing and reading rollouts: this store against `datasets.Dataset.from_list(...).to_parquet()` and JSON lines.

    python benchmarks/store/bench.py --rows 200000 --small 20000 --baseline-rows 200000 --out results.json

Rows are the same for all: token ids of Python's own library (a word or sign a token), so that phrases repeat as they
do in text, lengths 200 to 1,800 with mean 1,000, and float32 log-probabilities of which 60 % are near zero. Each
variant runs in a process of its own. Making the rows is not timed; fsync and checksums of the store are.
The store writes them twice. Once each shard is waited for before the next row is made, so that nothing is hidden; once
as it is used, a shard being written while the next rows come, and then the time that making the rows takes alone is
subtracted: what storing adds to a process that makes rows.
`from_list` needs some 70 KB of memory a row of 1,000 tokens: give --baseline-rows fewer where memory is short; times
and bytes are then compared a row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.rollouts import schema
from pipeline.rollouts.schema import Rollout

GROUP = 8
SHARD_GROUPS = 512
"""As many as the writer makes a shard of."""


class Corpus:
    """Tokens of the standard library's source, with each token's place in the text."""

    def __init__(self) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        self.text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
        words = [match.span() for match in re.finditer(r"\n *| ?\w+|.", self.text)]
        vocabulary: dict[str, int] = {}
        self.tokens = np.array([vocabulary.setdefault(self.text[a:b], len(vocabulary)) for a, b in words], np.int32)
        self.places = np.array([a for a, _ in words] + [len(self.text)], np.int64)
        # What a model of single tokens could compress the ids to.
        counts = np.bincount(self.tokens)
        share = counts[counts > 0] / len(self.tokens)
        self.unigram_bits = float(-(share * np.log2(share)).sum())

    def groups(self, rows: int) -> Iterator[list[Rollout]]:
        for number in range(rows // GROUP):
            dice = np.random.default_rng(number)
            prompt_id = hashlib.sha256(str(number).encode()).hexdigest()[:16]
            start = int(dice.integers(len(self.tokens) - 2000))
            prompt = self.tokens[start : start + 100].tolist()
            yield [self._rollout(prompt_id, sample, prompt, dice) for sample in range(GROUP)]

    def _rollout(self, prompt_id: str, sample: int, prompt: list[int], dice: np.random.Generator) -> Rollout:
        length = int(dice.integers(200, 1801))
        start = int(dice.integers(len(self.tokens) - length))
        near = dice.exponential(0.01, length) * dice.random(length)
        logprobs = -np.where(dice.random(length) < 0.6, near, dice.exponential(1.2, length)).astype(np.float32)
        return Rollout(
            rollout_id=schema.rollout_id("000000-bench", 0, prompt_id, sample, sample),
            round=0,
            snapshot_id="000000-bench",
            snapshot_step=0,
            prompt_id=prompt_id,
            sample=sample,
            prompt_tokens=prompt,
            completion_tokens=self.tokens[start : start + length].tolist(),
            logprobs=logprobs.tolist(),
            completion=self.text[self.places[start] : self.places[start + length]],
            finish_reason="stop",
            seed=sample,
        )


def provenance() -> Any:
    from pipeline.rollouts.store import Provenance

    same = dict.fromkeys(("snapshot_sha256", "tokenizer_sha256", "chat_template_sha256", "prompts_sha256"), "0" * 64)
    words = {"logprobs_mode": "processed_logprobs", "engine": "none", "engine_version": "0", "code_version": "0"}
    return Provenance(
        snapshot_id="000000-bench", snapshot_step=0, round=0, sampling={"samples": GROUP}, **same, **words
    )


class Clock:
    """Wall-clock and processor seconds (all threads) between `start` and `stop`, added up.

    Processor seconds can be compared on a machine that others use, too. `added`: seconds by which storing made the
    whole longer.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = self.added = 0.0

    def start(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def store_write(corpus: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    from pipeline.rollouts.store import RolloutWriter

    with RolloutWriter(folder.with_name("warm-up"), provenance(), samples=GROUP) as writer:
        writer.add_group(next(corpus.groups(GROUP)))  # pyarrow imports pandas at the first array
    started = time.perf_counter()
    for _ in corpus.groups(rows):
        pass
    made = time.perf_counter()
    with RolloutWriter(folder.with_name("as-used"), provenance(), samples=GROUP) as writer:
        for group in corpus.groups(rows):
            writer.add_group(group)
    clock.added = (time.perf_counter() - made) - (made - started)
    shutil.rmtree(folder.with_name("as-used"))
    shutil.rmtree(folder.with_name("warm-up"))
    clock.start()
    with RolloutWriter(folder, provenance(), samples=GROUP) as writer:
        clock.stop()
        for number, group in enumerate(corpus.groups(rows), 1):
            clock.start()
            writer.add_group(group)
            if number % SHARD_GROUPS == 0:
                writer.commit()
            clock.stop()
        clock.start()
    clock.stop()


def store_read(_: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    from pipeline.rollouts.store import iter_batches

    clock.start()
    assert sum(batch.num_rows for batch in iter_batches(folder)) == rows
    clock.stop()


def from_list_write(corpus: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    from datasets import Dataset

    table = [rollout.as_row() for group in corpus.groups(rows) for rollout in group]
    folder.mkdir()
    Dataset.from_list(table[:GROUP])  # whatever is imported at first use
    clock.start()
    Dataset.from_list(table).to_parquet(folder / "data.parquet")
    clock.stop()


def from_list_read(_: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    from datasets import Dataset

    clock.start()
    data = Dataset.from_parquet(str(folder / "data.parquet"), cache_dir=str(folder.parent / "cache"))
    assert sum(batch.num_rows for batch in data.with_format("arrow").iter(1024)) == rows
    clock.stop()


def jsonl_write(corpus: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for group in corpus.groups(rows):
            clock.start()
            for rollout in group:
                file.write(json.dumps(rollout.as_row()) + "\n")
            clock.stop()
        clock.start()
        file.flush()
        os.fsync(file.fileno())
        clock.stop()


def jsonl_read(_: Corpus, folder: Path, rows: int, clock: Clock) -> None:
    clock.start()
    with (folder / "data.jsonl").open() as file:
        assert sum(1 for line in file if json.loads(line)) == rows
    clock.stop()


VARIANTS = {
    "store": (store_write, store_read),
    "from_list": (from_list_write, from_list_read),
    "jsonl": (jsonl_write, jsonl_read),
}


def one(name: str, verb: str, folder: Path, rows: int) -> None:
    """Runs one variant in this process and prints what it took."""
    corpus = Corpus()
    clock = Clock()
    VARIANTS[name][verb == "read"](corpus, folder, rows, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(path.stat().st_size for path in folder.iterdir())
    found = {"seconds": clock.wall, "cpu": clock.cpu, "added": clock.added, "peak_mib": peak, "bytes": size}
    print(json.dumps({**found, "unigram_bits": corpus.unigram_bits}))


def measured(name: str, rows: int, scratch: Path) -> dict[str, Any]:
    """Writes and reads in child processes; the read's memory is the child's own."""
    folder = scratch / f"{name}-{rows}"
    found: dict[str, Any] = {"variant": name, "rows": rows}
    for verb in ("write", "read"):
        command = [sys.executable, __file__, "--one", name, verb, str(folder), str(rows)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result = json.loads(output.splitlines()[-1])
        found |= {f"{verb}_{key}": result[key] for key in ("seconds", "cpu", "added", "peak_mib")}
        found |= {key: result[key] for key in ("bytes", "unigram_bits")}
    if name == "store":
        from pipeline.rollouts.store import read_manifest

        found["tokens"] = read_manifest(folder).tokens
        found["columns"] = column_bytes(folder)
    shutil.rmtree(folder)
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    return found


def column_bytes(folder: Path) -> dict[str, int]:
    """Compressed bytes of each column over all shards."""
    import pyarrow.parquet as pq

    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def report(results: list[dict[str, Any]]) -> list[str]:
    """The comparison in sentences, and whether each bound holds."""
    by = {(result["variant"], result["rows"]): result for result in results}
    ours = [result for result in results if result["variant"] == "store"]
    small, large = ours[0], ours[-1]
    lines = []
    for result in results:
        rows = result["rows"]
        each = {key: 1e6 * result[key] / rows for key in ("write_seconds", "write_cpu", "read_seconds", "read_cpu")}
        lines.append(
            f"{result['variant']:>9} {rows:>7,} rows: us a row: write {each['write_seconds']:6.1f} "
            f"(processor {each['write_cpu']:6.1f}), read {each['read_seconds']:6.1f} ({each['read_cpu']:6.1f}); "
            f"{result['bytes'] / rows:6.0f} bytes a row; peak {result['write_peak_mib']:5.0f} MiB writing, "
            f"{result['read_peak_mib']:5.0f} reading"
        )
    base = next(result for (variant, _), result in by.items() if variant == "from_list")
    theirs = base["write_seconds"] / base["rows"]
    alone, used = (theirs / (large[key] / large["rows"]) for key in ("write_seconds", "write_added"))
    leaner = (base["write_cpu"] / base["rows"]) / (large["write_cpu"] / large["rows"])
    smaller = (large["bytes"] / large["rows"]) / (base["bytes"] / base["rows"])
    growth = max(large[f"{verb}_peak_mib"] / small[f"{verb}_peak_mib"] for verb in ("write", "read"))
    per_token = {name: size / large["tokens"] for name, size in large["columns"].items()}
    # A float32 has 23 bits of mantissa that nothing predicts; sign and exponent of these take some 3 more.
    floor = large["unigram_bits"] / 8 + 26 / 8
    lines += [
        f"{used:.1f} times faster to write than from_list as it is used, while rows are made (bound 5): "
        f"{'holds' if used >= 5 else 'FAILS'} ({1e6 * large['write_added'] / large['rows']:.1f} us a row added); "
        f"{alone:.1f} times with nothing hidden, {leaner:.1f} times by processor time",
        f"{smaller:.2f} of from_list's bytes (bound 0.6): {'holds' if smaller <= 0.6 else 'FAILS'}",
        f"peak memory grows by {growth:.2f} from {small['rows']:,} to {large['rows']:,} rows (bound 1.10): "
        f"{'holds' if growth <= 1.1 else 'FAILS'}",
        f"{large['bytes'] / large['tokens']:.2f} bytes a token in all: ids {per_token['completion_tokens']:.2f}, "
        f"log-probabilities {per_token['logprobs']:.2f}, text {per_token['completion']:.2f}; ids and "
        f"log-probabilities of independent tokens could not go below {floor:.2f}",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--small", type=int, default=20_000)
    parser.add_argument("--baseline-rows", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, verb, folder, rows = given.one
        one(name, verb, Path(folder), int(rows))
        return
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        plan = [("store", given.small), ("store", given.rows)]
        plan += [("from_list", given.baseline_rows), ("jsonl", given.baseline_rows)]
        results = [measured(name, rows, Path(scratch)) for name, rows in plan]
    lines = report(results)
    print("\n".join(lines))
    if given.out:
        machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "machine": platform.machine()}
        given.out.write_text(json.dumps({"results": results, "report": lines, **machine}, indent=1) + "\n")
    if any("FAILS" in line for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
