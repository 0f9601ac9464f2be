"""What the learner's benchmarks are made from: random policies, rollouts of random tokens, ranks of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.policies import snapshots
from pipeline.recipe import ColdStart
from pipeline.rollouts.schema import VERDICTS, Rollout, rollout_id
from pipeline.rollouts.store import Provenance, RolloutWriter
from trainer import launching
from trainer.nodes import free_port
from trainer.policy import make_model, make_tokenizer


def random_policy(folder: Path, shape: ColdStart, places: int = 1024, spread: float | None = None) -> Path:
    """A Qwen3 of random weights that has so many places; `spread` is the weights' standard deviation."""
    torch.manual_seed(0)
    texts = [f"compute {a} + {b} = {a + b}" for a in range(30) for b in range(5)]
    tokenizer = make_tokenizer(texts, 300)
    model = make_model(shape, tokenizer)
    if shape.vocabulary > len(tokenizer):
        model.resize_token_embeddings(shape.vocabulary)
    model.config.max_position_embeddings = places
    for parameter in model.parameters():
        if spread is not None and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=spread)

    def fill(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    record = snapshots.publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)
    return folder / record.snapshot_id


def random_rollouts(folder: Path, policy: Path, lengths: Sequence[int], samples: int) -> None:
    """Groups of completions of so many random tokens each, without log-probabilities; every other one is right."""
    record, dice = snapshots.load_record(policy), random.Random(0)
    origin = Provenance(
        snapshot_id=record.snapshot_id, snapshot_sha256=record.sha256, snapshot_step=0, round=0,
        sampling={"samples": samples, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": max(lengths)},
        logprobs_mode="missing", engine="none", engine_version="0", tokenizer_sha256=record.tokenizer_sha256,
        chat_template_sha256=record.chat_template_sha256, code_version="0", prompts_sha256="",
    )  # fmt: skip
    verdicts = []
    with RolloutWriter(folder, origin, samples=samples) as writer:
        for number in range(len(lengths) // samples):
            name, prompt = f"{number:016x}", [dice.randrange(3, 250) for _ in range(8)]
            group = []
            for sample in range(samples):
                row = rollout_id(record.snapshot_id, 0, name, sample, sample)
                completion = [dice.randrange(3, 250) for _ in range(lengths[number * samples + sample])]
                group.append(
                    Rollout(row, 0, record.snapshot_id, 0, name, sample, prompt, completion, None, "", "stop", sample)
                )
                told: dict[str, Any] = {"rollout_id": row, "verifier": "drawn", "verifier_version": "1"}
                told |= {"status": ("correct", "wrong")[sample % 2], "reward": float(sample % 2 == 0), "detail": ""}
                verdicts.append(told | {"wall_ms": 0.0, "isolation": "none"})
            writer.add_group(group)
    (folder / "verdicts").mkdir()
    pq.write_table(pa.Table.from_pylist(verdicts, VERDICTS), folder / "verdicts" / "drawn-1.parquet")


def on_ranks(count: int, module: str, *words: object) -> list[dict[str, Any]]:
    """What `python -m module words...` prints as its last line, JSON, on each of `count` ranks."""
    common = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    told = []
    for rank in ranks:
        output, errors = rank.communicate()
        if rank.returncode:
            sys.exit(errors[-3000:])
        told.append(json.loads(output.splitlines()[-1]))
    return told


def join_ranks() -> None:
    """Joins the ranks that `on_ranks` started, or makes this process the only one."""
    import deepspeed

    launching.become_a_rank()
    deepspeed.init_distributed(launching.backend(), verbose=False)


def machine() -> str:
    """The machine in a line, with how fast it is just now."""
    import time

    left, right = torch.ones(512, 512), torch.ones(512, 512)
    best = 0.0
    for _ in range(50):
        began = time.perf_counter()
        left @ right
        best = max(best, 2 * 512**3 / (time.perf_counter() - began))
    threads = torch.get_num_threads()
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {best / 1e9:.0f} GFLOP/s on {threads} threads"
