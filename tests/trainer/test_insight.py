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

from pipeline.recipe import Recipe
from trainer import agreement, insight
from trainer.passes import collate
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
    assert 0 < record["utilisation"] < 1
    assert learned.summary["matmul_flops"] > 1e9
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
    for name in ("loss", "lag", "kl_k3", "utilisation"):
        found = [(event.step, event.value) for event in events.Scalars(f"learning/{name}")]
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in learned.log]


def test_work_counts_every_matrix_product(policy: Path) -> None:
    """Against PyTorch's own count of a forward and a backward pass, attention aside."""
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.view import Example

    model = load_policy(policy).train()
    tokens = torch.arange(3, 40, dtype=torch.int32).numpy()
    nothing = torch.zeros(37).numpy()
    taken = collate([Example(tokens[:9], tokens, nothing, nothing, 0.0, 0.0)], [0], 0, None)
    with FlopCounterMode(display=False) as counter:
        # Done plainly: the counter does not know the product that adds to what is there, which our head uses.
        hidden = model.base_model(input_ids=taken.ids).last_hidden_state.flatten(0, 1)
        model.lm_head(hidden[taken.sources]).sum().backward()
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "mm" in str(operation))
    assert insight.Work(model).flops(taken) == pytest.approx(products, rel=0.02)


def test_a_log_forgets_what_was_not_checkpointed(group_of_one: None, tmp_path: Path) -> None:
    """Steps past the checkpoint are done again; a line cut short by a kill is not taken for one."""
    path = tmp_path / "learning.jsonl"
    path.write_text('{"step": 4}\n{"step": 5}\n{"step": 6}\n{"step": 7', encoding="utf-8")
    log = insight.Log(path, False, range(4, 6))
    log.add({"step": 6, "loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [4, 5, 6]


def _entropy(policy: Path, rows: Sequence[Any]) -> float:
    """Over all completion tokens, one sequence at a time, nats."""
    model, found = load_policy(policy, torch.float64), []
    for row in rows:
        ids = torch.tensor([[*row.prompt_tokens, *row.completion_tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(row.prompt_tokens) - 1 : -1]
        found.append(torch.distributions.Categorical(logits=logits).entropy())
    return float(torch.cat(found).mean())
