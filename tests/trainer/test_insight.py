"""What learning shows: its log, for people and for TensorBoard, and how much of the machine it uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_parts import Learned, Made

from pipeline.planning.memory import learner_memory
from pipeline.policies.shapes import GIB, shape_of
from pipeline.recipe import Recipe
from trainer import agreement, insight
from trainer.arithmetic import Arithmetic, of_model
from trainer.dealing import Amount
from trainer.policy import load_policy
from trainer.view import Sizes

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


def test_every_step_says_what_it_did(learn_here: Learn, recipe: Recipes, dataset: Made, policy: Path) -> None:
    rows = [(row, reward) for group in dataset.groups() if len({r for _, r in group}) > 1 for row, reward in group]
    learned = learn_here(dataset.place, recipe(batch_size=len(rows), epochs=2))
    record = learned.log[0]
    assert record["tokens"] == sum(len(row.completion_tokens) for row, _ in rows)
    assert record["padding"] == 0.0
    # A prompt of a group is computed once, and a completion's last token not at all.
    whole = sum(len(row.prompt_tokens) + len(row.completion_tokens) for row, _ in rows)
    prompts = sum(len(group[0][0].prompt_tokens) for group in dataset.groups() if len({r for _, r in group}) > 1)
    computed = prompts + sum(len(row.completion_tokens) - 1 for row, _ in rows)
    assert record["shared"] == pytest.approx(1 - computed / whole)
    # The policy is two layers of 32 wide; the numbers of the log fit together, and the summary's with them.
    counted = amount_of_one_pass(rows)
    share = of_model(load_policy(policy)).of(counted.positions, counted.targets, counted.pairs)
    summary = learned.summary
    assert summary["peak_flops"] > 1e9 and summary["peak_flops_source"].startswith("measured")
    seconds = record["tokens"] / record["tokens_per_second"]
    assert seconds == pytest.approx(record["seconds"], abs=1e-4)
    assert record["mfu"] == pytest.approx(share / seconds / summary["peak_flops"])
    assert record["tokens_per_second_per_rank"] == record["tokens_per_second"]
    assert 0.1 < record["peak_resident_gib"] <= summary["peak_resident_gib"]
    assert 0 < summary["planned_memory_gib"] < 2
    # The policy is untrained, so that no token's distribution is far from even.
    assert record["entropy"] == pytest.approx(_entropy(policy, [row for row, _ in rows]), rel=0.02)
    padded = learn_here(dataset.place, recipe(batch_size=1000, packing=False, epochs=1, micro_batch_tokens=10**6))
    longest = max(len(row.prompt_tokens) + len(row.completion_tokens) for row, _ in rows)
    assert padded.log[0]["padding"] == pytest.approx(1 - whole / (longest * len(rows)))


def test_the_gap_of_tokens_and_of_sequences(group_of_one: None) -> None:
    """By hand, in two passes: gaps 0.5 and -0.25; of a token nothing, and 1; of a whole sequence nothing."""
    nothing = float("nan")
    gap = insight.Gap(torch.device("cpu"))
    trainer = torch.tensor([[-1.0, -2.0, 7.0], [-3.0, -1.0, -1.0]])
    engine = torch.tensor([[-1.5, -1.75, 9.0], [nothing, -2.0, nothing]])
    gap.add(trainer, engine, torch.tensor([[True, True, False], [True, True, False]]))
    gap.add(torch.tensor([[-1.0]]), torch.tensor([[nothing]]), torch.tensor([[True]]))
    assert gap.over_ranks() == {
        "mean": pytest.approx(1.25 / 3), "mean_abs": pytest.approx(1.75 / 3), "max_abs": 1.0, "tokens": 3,
        "sequence_mean": pytest.approx(1.25 / 2), "sequences": 2,
    }  # fmt: skip


def test_rows_on_which_a_leak_would_show() -> None:
    """The pair of one prompt whose shorter one is longest, and the longest of another prompt; or what there is."""
    prompt = np.full(6, 3)
    sizes = Sizes(prompt, np.array([9, 400, 30, 90, 80, 7]), np.array([0, 0, 1, 2, 2, 2]), True)
    assert agreement._telling(sizes) == [3, 4, 1]
    assert agreement._telling(Sizes(prompt[:2], np.array([5, 8]), np.array([4, 4]), True)) == [1, 0]
    assert agreement._telling(Sizes(prompt[:3], np.array([5, 8, 6]), np.array([0, 1, 2]), True)) == [1, 2]
    assert agreement._telling(Sizes(prompt[:1], np.array([5]), np.array([0]), True)) == [0]


@pytest.mark.parametrize("loss", ["grpo", "sft"])
def test_other_losses_learn_from_the_same_batches(loss: str, learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    """Right completions become likelier under each of them; batches, hence tokens, are oapl's."""
    ours = learn_here(dataset.place, recipe())
    other = learn_here(dataset.place, recipe(loss=loss, epochs=2))
    assert [record["tokens"] for record in other.log] == [record["tokens"] for record in ours.log]
    assert other.summary["loss"] == loss
    assert ("clipped" in other.log[0]) == (loss == "grpo")
    longer = learn_here(dataset.place, recipe(loss=loss, epochs=12))
    assert longer.log[-1]["loss"] < other.log[0]["loss"] - 0.01


def test_tensorboard_gets_every_number(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learned = learn_here(dataset.place, recipe(tensorboard=True))
    events = EventAccumulator(str(learned.out / "learning"))
    events.Reload()
    for name in ("loss", "lag", "kl_k3", "mfu", "tokens_per_second", "peak_resident_gib"):
        found = [(event.step, event.value) for event in events.Scalars(f"learning/{name}")]
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in learned.log]


def flops_of(model: Any, lengths: list[tuple[int, int]]) -> dict[str, int]:
    """PyTorch's own count of forward and backward passes, one sequence of (prompt, completion) at a time, all keys."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        # Done plainly: the counter does not know the product that adds to what is there, which our head uses.
        for prompt, completion in lengths:
            ids = torch.arange(3, 3 + prompt + completion)[None]
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            model.lm_head(hidden[prompt - 1 : -1]).sum().backward()
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    found = {"aten.mm": 0, "aten.bmm": 0}
    for operation, count in counts.items():
        found[str(operation)] += count
    return found


def test_arithmetic_is_what_pytorch_counts(policy: Path) -> None:
    """Products with weights exactly; attention's for as many keys as there are, all of which the plain kernel takes."""
    model = load_policy(policy, attention="eager").train()
    found = flops_of(model, [(9, 37), (4, 1)])
    ours = of_model(model)
    assert ours.of(46 + 5, 37 + 1, 0) == found["aten.mm"]
    assert ours.of(0, 0, 46**2 + 5**2) == found["aten.bmm"]
    # By hand: four attention matrices of 32 x 32, two of 32 x 16, three of 32 x 64; two layers, four heads of eight.
    assert ours == Arithmetic(6 * 2 * (2 * 1024 + 2 * 512 + 3 * 2048), 6 * 32 * model.config.vocab_size, 12 * 2 * 32)


def test_frozen_weights_have_no_gradient_of_their_own(policy: Path) -> None:
    from trainer import adapters

    model = load_policy(policy, attention="eager").train()
    whole = of_model(model)
    adapters.add(model, 4, 8)
    ours, found = of_model(model), flops_of(model, [(9, 37)])
    assert ours.target == pytest.approx(whole.target * 2 / 3)
    assert ours.pair * 46**2 == found["aten.bmm"]
    # PyTorch stops at the first layer's queries, keys and values, of whose inputs nobody needs a gradient.
    assert 0.85 < found["aten.mm"] / ours.of(46, 37, 0) < 1


def test_rates_by_hand() -> None:
    """6,000 tokens and 3e14 operations in 2 seconds on 4 ranks of 1e14 a second each."""
    assert insight.rates(6000, 3e14, 2.0, 4, 1e14) == {
        "tokens_per_second": 3000, "tokens_per_second_per_rank": 750, "mfu": pytest.approx(0.375),
    }  # fmt: skip


def test_speed_of_a_round_is_over_all_of_its_steps(group_of_one: None) -> None:
    speed = insight.Speed(torch.device("cpu"), "float32", 1)
    first, second = speed.step(100, 1e9, 1.0), speed.step(500, 1e9, 2.0)
    told = speed.told()
    assert (first["tokens_per_second"], second["tokens_per_second"], told["tokens_per_second"]) == (100, 250, 200)
    assert told["mfu"] == pytest.approx(2e9 / 3 / told["peak_flops"])
    # All that a process holds; this one has PyTorch in it.
    assert 0.1 < first["peak_resident_gib"] <= told["peak_resident_gib"]


def test_planned_memory_is_the_plans(policy: Path, recipe: Recipes) -> None:
    wanted = recipe(zero_stage=1, activation_checkpointing=True)
    shape = shape_of(wanted, policy)
    planned = [
        learner_memory(recipe(ranks=n, zero_stage=1, activation_checkpointing=True), shape, 1).total(True)
        for n in (1, 2)
    ]
    assert [insight.planned_memory(wanted, policy, n) for n in (1, 2)] == [value / GIB for value in planned]
    assert planned[0] != planned[1]


def test_a_policy_that_no_plan_knows_has_none(policy: Path, recipe: Recipes, tmp_path: Path) -> None:
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}), encoding="utf-8")
    assert insight.planned_memory(recipe(), tmp_path, 1) is None


def test_a_log_forgets_what_was_not_checkpointed(group_of_one: None, tmp_path: Path) -> None:
    """Steps past the checkpoint are done again; a line cut short by a kill is not taken for one."""
    path = tmp_path / "learning.jsonl"
    path.write_text('{"step": 4}\n{"step": 5}\n{"step": 6}\n{"step": 7', encoding="utf-8")
    log = insight.Log(path, False, range(4, 6))
    log.add({"step": 6, "loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [4, 5, 6]


def amount_of_one_pass(rows: Sequence[Any]) -> Amount:
    """By hand: each prompt once, queries with their keys."""
    positions = targets = pairs = 0
    prompts = {row.prompt_id: len(row.prompt_tokens) for row, _ in rows}
    for length in prompts.values():
        positions, pairs = positions + length, pairs + sum(range(1, length + 1))
    for row, _ in rows:
        prompt, completion = len(row.prompt_tokens), len(row.completion_tokens)
        positions, targets = positions + completion - 1, targets + completion
        pairs += sum(range(prompt + 1, prompt + completion))
    return Amount(positions, positions, targets, pairs)


def _entropy(policy: Path, rows: Sequence[Any]) -> float:
    """Over all completion tokens, one sequence at a time, nats."""
    model, found = load_policy(policy, torch.float64), []
    for row in rows:
        ids = torch.tensor([[*row.prompt_tokens, *row.completion_tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt_tokens) - 1 : -1]
        found.append(torch.distributions.Categorical(logits=logits).entropy())
    return float(torch.cat(found).mean())
