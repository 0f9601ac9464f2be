"""Small real parts for the learner's tests: a random Qwen3, a dataset that it wrote, and a process group of one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.recipe import ColdStart, Recipe
from pipeline.rollouts.schema import VERDICTS, Rollout, rollout_id
from pipeline.rollouts.store import Provenance, RolloutWriter
from trainer.policy import make_model, make_tokenizer

SMALL = ColdStart(vocabulary=300, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64)
TEXTS = [f"compute {a} + {b} = {a + b}" for a in range(30) for b in range(5)]

RECIPE = """
name: small
seed: 3
policy: {model: .}
learning:
  batch_size: 8
  epochs: 2
  learning_rate: 2.0e-3
  beta2: 0.05
  adam_epsilon: 1.0e-3
  clip: 0.5
  micro_batch_tokens: 4096
  dtype: float32
  activation_checkpointing: false
"""


def make_policy(folder: Path, seed: int, texts: list[str] = TEXTS) -> Path:
    """Publishes a random policy below `folder`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts, SMALL.vocabulary)
    model = make_model(SMALL, tokenizer)

    def fill(place: Path) -> None:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)

    record = snapshots.publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)
    return folder / record.snapshot_id


def plain_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """log pi of the completion's tokens: one sequence, all logits, no code of ours. [tokens]"""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    rows = torch.arange(len(completion))
    return torch.log_softmax(logits / temperature, dim=-1)[rows, torch.tensor(completion)]


@dataclass
class Made:
    """A dataset as tests want it; `rows` holds what was written with each row's reward."""

    place: Path
    rows: list[tuple[Rollout, float | None]] = field(default_factory=list)
    temperature: float = 1.0

    def groups(self) -> Iterator[list[tuple[Rollout, float | None]]]:
        by_prompt: dict[str, list[tuple[Rollout, float | None]]] = {}
        for row in self.rows:
            by_prompt.setdefault(row[0].prompt_id, []).append(row)
        yield from by_prompt.values()


def write_dataset(
    place: Path,
    policy: Path,
    model: Any,
    *,
    prompts: int = 6,
    samples: int = 4,
    longest: int = 14,
    seed: int = 0,
    temperature: float = 0.8,
    noise: float = 0.02,
    shift: float = 0.0,
    logprobs: bool = True,
    round: int = 0,
    reward: Callable[[int, int], float | None] = lambda prompt, sample: float((prompt + sample) % 3 == 0),
    verdicts: bool = True,
    tokenizer: str | None = None,
    largest: int | None = None,
) -> Made:
    """Rollouts of random tokens, as `oapl generate` leaves them, with log-probabilities from the float64 model.

    `noise` keeps the learner's first log-ratio from being zero; `shift` is the engine's bias in nats a token.
    `largest` puts a token into the last completion after its log-probabilities were made.
    """
    rng = random.Random(seed)
    record = snapshots.load_record(policy)
    made = Made(place, temperature=temperature)
    for prompt in range(prompts):
        tokens = [rng.randrange(3, 250) for _ in range(rng.randrange(2, 9))]
        prompt_id = hashlib.sha256(f"{seed}/{prompt}".encode()).hexdigest()[:16]
        for sample in range(samples):
            completion = [rng.randrange(3, 250) for _ in range(rng.randrange(1, longest))]
            with torch.no_grad():
                exact = plain_logprobs(model, tokens, completion, temperature).tolist()
            stored = [min(0.0, value + rng.gauss(0, noise) - shift) for value in exact] if logprobs else None
            if largest is not None and prompt == prompts - 1:
                completion[-1] = largest
            name = rollout_id(record.snapshot_id, round, prompt_id, sample, sample)
            rollout = Rollout(
                name, round, record.snapshot_id, record.step, prompt_id, sample, tokens, completion, stored,
                "", "stop", sample,
            )  # fmt: skip
            made.rows.append((rollout, reward(prompt, sample)))
    provenance = Provenance(
        snapshot_id=record.snapshot_id,
        snapshot_sha256=record.sha256,
        snapshot_step=record.step,
        round=round,
        sampling={"samples": samples, "temperature": temperature, "top_p": 1.0, "top_k": 0, "max_tokens": longest},
        logprobs_mode="processed_logprobs" if logprobs else "missing",
        engine="test",
        engine_version="0",
        tokenizer_sha256=record.tokenizer_sha256 if tokenizer is None else tokenizer,
        chat_template_sha256=record.chat_template_sha256,
        code_version="test",
        prompts_sha256="",
    )
    with RolloutWriter(place, provenance, samples=samples, shard_rows=8) as writer:
        for group in made.groups():
            writer.add_group([rollout for rollout, _ in group])
    if verdicts:
        write_verdicts(place / "verdicts", made.rows)
    return made


def write_verdicts(folder: Path, rows: list[tuple[Rollout, float | None]], version: str = "1") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        {
            "rollout_id": rollout.rollout_id,
            "verifier": "test",
            "verifier_version": version,
            "status": "bad_reference" if reward is None else "correct" if reward else "wrong",
            "reward": reward,
            "detail": "",
            "wall_ms": 0.0,
            "isolation": "none",
        }
        for rollout, reward in rows
    ]
    pq.write_table(pa.Table.from_pylist(table, VERDICTS), folder / f"test-{version}.parquet")


def write_round(run: Run, number: int, policy: Path, model: Any, **settings: Any) -> Made:
    """A round of a run: its rollouts and verdicts where the layout has them."""
    made = write_dataset(run.rollouts(number), policy, model, round=number, verdicts=False, **settings)
    write_verdicts(run.verdicts(number), made.rows)
    return made


@dataclass(frozen=True)
class Learned:
    """What a round of learning left."""

    summary: dict[str, Any]
    log: list[dict[str, float]]
    out: Path

    @property
    def snapshot(self) -> Path:
        return self.out / self.summary["snapshot_id"]

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.snapshot / "model.safetensors")


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def learned(out: Path) -> Learned:
    summary = json.loads((out / "learning.json").read_text(encoding="utf-8"))
    return Learned(summary, read_log(out / "learning.jsonl"), out)


RANK = """
import os, pickle, sys
from pathlib import Path
import deepspeed, torch, torch.distributed as dist
torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(os.environ["RANK"]),
                        world_size=int(os.environ["WORLD_SIZE"]))
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
from pipeline.ending import leave
from pipeline import logits
from trainer import engine
from trainer import learner
sys.path.insert(0, sys.argv[3])
import no_waiting
no_waiting.in_passes(learner)
learn = learner.learn
# As with long sequences and large weights: several chunks of logits, not as many on each rank, and nothing that ZeRO-3
# would rather keep whole.
logits.CHUNK_ELEMENTS, logits.KEPT_ELEMENTS = 1200, 2400
configured = engine.deepspeed_config
def deepspeed_config(settings):
    told = configured(settings)
    told["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return told
engine.deepspeed_config = deepspeed_config
for work in pickle.loads(Path(sys.argv[1]).read_bytes()):
    learn(work)
dist.barrier()
leave()
"""


def learn_in_processes(count: int, works: list[Any], folder: Path) -> list[Learned]:
    """Rounds of learning (`trainer.work.Round`) one after another, on `count` ranks of their own."""
    (folder / "works").write_bytes(pickle.dumps(works))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder / "works"), str(folder / "store"), str(Path(__file__).parent)],
            env=trainer_environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=900)
        assert rank.returncode == 0, errors
    return [learned(work.out) for work in works]


def start_trainer(
    recipe: Recipe, place: Path, policy: Path, out: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m trainer` as a user starts it."""
    return subprocess.run(
        trainer_command(recipe, place, policy, out, *words),
        capture_output=True,
        text=True,
        timeout=120,
        env=trainer_environment(**environment),
        check=False,
    )


def trainer_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def trainer_command(recipe: Recipe, place: Path, policy: Path, out: Path, *words: str) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    recipe.save(out / "recipe.yaml")
    options = {"--recipe": out / "recipe.yaml", "--rollouts": place, "--policy": policy, "--out": out}
    return [sys.executable, "-m", "trainer", *words, *(str(word) for pair in options.items() for word in pair)]


def folder_hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed})
