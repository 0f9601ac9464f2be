"""However the work is split (ranks, DeepSpeed's stages, passes, memory), the same round gives the same update."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import no_waiting
import pytest
import torch
from learning_parts import Learned, Made, read_log, start_trainer, trainer_environment

from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]

TWO_RANKS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 1, small passes": {"zero_stage": 1, "micro_batch_tokens": 60},
    "ZeRO 2, padded": {"zero_stage": 2, "packing": False},
    "ZeRO 3, activations computed twice": {"zero_stage": 3, "activation_checkpointing": True},
    "recomputed": {"behaviour": "recomputed", "micro_batch_tokens": 100},
    "shared sequences": {"sequence_parallel": 2},
    "shared sequences, eager, ZeRO 2": {"sequence_parallel": 2, "attention": "eager", "zero_stage": 2},
    "shared sequences, ZeRO 3, small passes, activations computed twice": {
        "sequence_parallel": 2,
        "zero_stage": 3,
        "micro_batch_tokens": 20,
        "activation_checkpointing": True,
    },
    "shared sequences, recomputed": {"sequence_parallel": 2, "behaviour": "recomputed", "micro_batch_tokens": 50},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "two teams, ZeRO 3": {"sequence_parallel": 2, "zero_stage": 3, "micro_batch_tokens": 40},
    "two teams, ZeRO 1, recomputed": {"sequence_parallel": 2, "zero_stage": 1, "behaviour": "recomputed"},
    "one team, more ranks than key heads": {"sequence_parallel": 4},
}
ONE_RANK: dict[str, dict[str, Any]] = {
    "eager": {"attention": "eager"},
    "padded": {"packing": False, "micro_batch_tokens": 100},
    "ZeRO 2, optimizer on the host": {"zero_stage": 2, "offload": "optimizer"},
    "ZeRO 3, all on the host": {"zero_stage": 3, "offload": "all"},
    "one sequence a pass": {"micro_batch_tokens": 1},
    "all in one pass": {"micro_batch_tokens": 100_000},
}

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
from trainer import engine, logprobs
from trainer import learner
sys.path.insert(0, sys.argv[3])
import no_waiting
no_waiting.in_passes(learner)
learn = learner.learn
# As with long sequences and large weights: several chunks of logits, not as many on each rank, and nothing that ZeRO-3
# would rather keep whole.
logprobs.CHUNK_ELEMENTS, logprobs.KEPT_ELEMENTS = 1200, 2400
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


def learned(out: Path) -> Learned:
    summary = json.loads((out / "learning.json").read_text(encoding="utf-8"))
    return Learned(summary, read_log(out / "learning.jsonl"), out)


def learn_on(
    count: int, rounds: dict[str, dict[str, Any]], folder: Path, recipe: Recipes, dataset: Made, policy: Path
) -> dict[str, Learned]:
    """The rounds, one after another in the same `count` processes."""
    from pipeline.rollouts.locate import locate
    from trainer.work import Round

    works = []
    for number, settings in enumerate(rounds.values()):
        out = folder / str(number)
        out.mkdir()
        wanted = recipe(ranks=count, **settings)
        works.append(Round(wanted, locate(dataset.place), policy, out, out / "learning.jsonl", 0))
    (folder / "works").write_bytes(pickle.dumps(works))
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                str(folder / "works"),
                str(folder / "store"),
                str(Path(no_waiting.__file__).parent),
            ],
            env=trainer_environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=900)
        assert rank.returncode == 0, errors
    return {name: learned(work.out) for name, work in zip(rounds, works, strict=True)}


@pytest.fixture(scope="module")
def on_two_ranks(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipes, dataset: Made, policy: Path
) -> dict[str, Learned]:
    return learn_on(2, TWO_RANKS, tmp_path_factory.mktemp("two"), recipe, dataset, policy)


@pytest.fixture(scope="module")
def on_four_ranks(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipes, dataset: Made, policy: Path
) -> dict[str, Learned]:
    return learn_on(4, FOUR_RANKS, tmp_path_factory.mktemp("four"), recipe, dataset, policy)


def assert_same_round(one: Learned, other: Learned) -> None:
    assert one.summary["steps"] == other.summary["steps"] > 2
    for ours, theirs in zip(one.log, other.log, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for key in ("loss", "grad_norm", "surprise", "log_ratio_abs"):
            # Recomputed, the first step's log-ratio is rounding alone.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    assert one.summary["logprob_gap"] == pytest.approx(other.summary["logprob_gap"], abs=1e-6)
    for key, value in one.weights().items():
        torch.testing.assert_close(value, other.weights()[key], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def reference(learn_here: Learn, recipe: Recipes, dataset: Made) -> Learned:
    return learn_here(dataset.place, recipe())


@pytest.fixture(scope="module")
def recomputed(learn_here: Learn, recipe: Recipes, dataset: Made) -> Learned:
    return learn_here(dataset.place, recipe(behaviour="recomputed"))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, on_two_ranks: dict[str, Learned], reference: Learned, recomputed: Learned) -> None:
    assert_same_round(recomputed if "recomputed" in name else reference, on_two_ranks[name])


@pytest.mark.system
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(name: str, on_four_ranks: dict[str, Learned], reference: Learned, recomputed: Learned) -> None:
    assert_same_round(recomputed if "recomputed" in name else reference, on_four_ranks[name])


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(name: str, reference: Learned, learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    assert_same_round(reference, learn_here(dataset.place, recipe(**ONE_RANK[name])))


def test_bfloat16_stays_close_and_keeps_master_weights(
    reference: Learned, learn_here: Learn, recipe: Recipes, dataset: Made
) -> None:
    """Steps of a 500th of a weight's size would be lost in bfloat16 weights; in master weights they add up."""
    rounded = learn_here(dataset.place, recipe(dtype="bfloat16"))
    for ours, theirs in zip(reference.log, rounded.log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    assert all(value.dtype == torch.bfloat16 for value in rounded.weights().values())
    worst = max((rounded.weights()[key].float() - value).abs().max() for key, value in reference.weights().items())
    assert worst < 0.01


def test_the_command_starts_its_ranks(
    reference: Learned, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    done = start_trainer(recipe(ranks=2), dataset.place, policy, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "log-probability gap" in done.stdout.splitlines()[-1]
    assert_same_round(reference, learned(tmp_path / "out"))
