"""A generation with a fake engine that writes down each prompt it is asked for; run as a child process.

fake_generation.py FOLDER CALLS GROUPS [SHARD_ROWS]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rollout_data import group, provenance

from pipeline.errors import OaplError
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.store import RolloutWriter


class CountingEngine:
    def __init__(self, calls: Path) -> None:
        self.calls = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def complete(self, number: int) -> list[Rollout]:
        rows = group(number, tokens=200)
        os.write(self.calls, f"{rows[0].prompt_id}\n".encode())
        time.sleep(0.001)
        return rows


def main(folder: str, calls: str, count: str, shard_rows: str = "12") -> None:
    engine = CountingEngine(Path(calls))
    with RolloutWriter(Path(folder), provenance(), samples=4, shard_rows=int(shard_rows)) as writer:
        for number in range(int(count)):
            if group(number, tokens=1)[0].prompt_id not in writer.committed:
                writer.add_group(engine.complete(number))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OaplError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
