"""What is told of a recipe before anything starts: against machines that are described and numbers made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RequestError
from pipeline.planning import preflight
from pipeline.planning.fits import Check, fits, known_shape, refuse
from pipeline.planning.machine import Card, Machine, this_machine, visible
from pipeline.policies.shapes import shape_of
from pipeline.recipe import Recipe, load_recipe

CONFIG = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 6, "max_position_embeddings": 4096,
}  # fmt: skip


def cards(count: int, memory: float, host: float = 2000) -> Machine:
    return Machine("one", (Card("H", memory),) * count, host, host)


def found(recipe: Recipe, machine: Machine, place: Path = Path("/")) -> dict[str, Check]:
    return {one.name: one for one in fits(recipe, known_shape(recipe), machine, place)}


@pytest.mark.parametrize(
    ("changes", "machine", "name", "told", "mend"),
    [
        ([], cards(4, 80), "learner's cards", "learning.ranks=8 want 8 cards, and 4", "set learning.ranks=4"),
        (["generation.tensor_parallel=16"], cards(8, 80), "engine's cards", "16 of 8 cards", "tensor_parallel=8"),
        (["learning.zero_stage=1"], cards(8, 40), "learner's memory", "90% of a card's 40 GiB", "learning.zero_stage"),
        (["generation.tensor_parallel=5"], cards(8, 80), "heads", "32 attention heads in", "tensor_parallel=4"),
        (["generation.max_model_len=300000"], cards(8, 80), "positions", "knows 262,144", "lower generation.max_m"),
        (["evaluation.max_tokens=300000"], cards(8, 80), "positions", "knows 262,144", "lower evaluation.max_tokens"),
        (["generation.max_model_len=18431"], cards(8, 80), "lengths", "prompts.max_tokens=2048", "_len=18432"),
        (["generation.gpu_memory_utilization=0.12"], cards(8, 80), "engine's memory", "994 MiB for keys", "raise gen"),
        (["learning.offload=optimizer"], cards(8, 80, 50), "host's memory", "59.9 GiB in the host's", "offload=none"),
        ([], Machine("none", (), 24, 20), "learner's memory", "8 ranks of the learner", "take"),
    ],
)
def test_what_does_not_fit(changes: list[str], machine: Machine, name: str, told: str, mend: str) -> None:
    """Each is refused by the one check; where nothing was changed but the machine, none of the others minds."""
    one = found(load_recipe("qwen3-4b-math", changes), machine)[name]
    assert one.fits is False
    assert told in one.told and mend in one.cure, one
    with pytest.raises(RequestError) as raised:
        refuse([one])
    assert "\n" not in str(raised.value) and one.cure in str(raised.value)


@pytest.mark.parametrize("name", ["qwen3-4b-math", "r1-14b-code"])
def test_the_named_recipes_fit_their_eight_cards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    checks = found(load_recipe(name), cards(8, 80))
    assert {one.fits for one in checks.values()} == {True}
    assert len(checks) >= 7


def test_the_disk_is_asked_for_weights_that_are_sure_to_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two snapshots of 2 P, 12 P kept for the next round and two checkpoints of 14 P: 44 P, of 4.02 billion weights."""
    recipe, needed = load_recipe("qwen3-4b-math"), 44 * 4_022_468_096
    for free, fitting in ((needed - 1, False), (needed, True)):
        usage = shutil._ntuple_diskusage(1 << 50, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
        assert found(recipe, cards(8, 80), tmp_path / "not" / "there")["disk"].fits is fitting


def test_ranks_on_several_nodes_need_their_share_of_cards() -> None:
    changes = ["learning.launcher=torchrun-hosts", "learning.hosts=[a,b]"]
    recipe = load_recipe("qwen3-4b-math", changes)
    assert recipe.learning.ranks_a_node == 4
    assert found(recipe, cards(4, 80))["learner's cards"].fits
    assert not found(recipe, cards(2, 80))["learner's cards"].fits
    for wrong in (["learning.hosts=[a,b]"], changes[:1], [changes[0], "learning.hosts=[a,b,c]"]):
        with pytest.raises(RequestError, match="hosts"):
            load_recipe("qwen3-4b-math", wrong)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "default", "rope_theta": 10000}, 4096),
    ],
)
def test_positions_with_a_scaled_rotation(scaling: dict[str, Any] | None, longest: int, tmp_path: Path) -> None:
    """As vLLM derives them (`_get_and_verify_max_len`)."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": scaling}))
    assert shape_of(load_recipe("tiny"), tmp_path).longest == longest


def test_a_policy_of_an_unknown_kind_is_not_judged_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    recipe = load_recipe("qwen3-4b-math", [f"policy.model={tmp_path}"])
    checks = found(recipe, cards(8, 1))
    assert checks["memory"].fits is None and checks["learner's cards"].fits


def test_cards_that_are_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [(str(n), f"GPU-{n}abc", Card(f"card {n}", 80.0)) for n in range(3)]
    names = {
        None: ["card 0", "card 1", "card 2"], "": [], "2,0": ["card 2", "card 0"], "GPU-1": ["card 1"],
        "1,7,0": ["card 1"], "MIG-x": ["MIG-x"],
    }  # fmt: skip
    for chosen, expected in names.items():
        assert [card.name for card in visible(listed, chosen)] == expected
    monkeypatch.setenv("OAPL_CARDS", "2x24")
    monkeypatch.setenv("OAPL_HOST_MEMORY", "64")
    here = this_machine()
    assert (len(here.cards), here.card_memory, here.free) == (2, 24.0, 64.0)
    monkeypatch.setenv("OAPL_CARDS", "many")
    with pytest.raises(RequestError, match=r"OAPL_CARDS='many': expected"):
        this_machine()


def test_a_trial_is_made_once_for_a_recipe_a_policy_and_a_machine(tmp_path: Path) -> None:
    """Each that changes has it made again; a failed one leaves no mark."""
    policy, mark, started = tmp_path / "policy", tmp_path / "preflight.json", []
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps(CONFIG))

    def start(name: str, module: str, words: Any) -> None:
        started.append(module)
        seen = {"seconds": 1.0, "longest": 256, "peak_bytes": 5 << 30, "device": "cpu", "tokens_per_second": 9.0}
        Path(words[-1]).write_text(json.dumps(seen))

    def fail(name: str, module: str, words: Any) -> None:
        raise RequestError("no")

    def tried(*changes: str, by: Any = start) -> dict[str, Any]:
        recipe = load_recipe("smollm2", [f"policy.model={policy}", *changes])
        return preflight.rehearse(recipe, tmp_path / "r.yaml", policy, mark, by)

    with pytest.raises(RequestError):
        tried(by=fail)
    assert not mark.exists()
    first = tried()
    assert started == ["pipeline.generation.rehearsal", "trainer.rehearsal"]
    assert "takes 5 GiB" in preflight.one_line(first) and "planned" in preflight.one_line(first)
    assert tried() == first and len(started) == 2
    tried("learning.beta2=0.3")
    assert len(started) == 4
    (policy / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    tried("learning.beta2=0.3")
    assert len(started) == 6
    tried("learning.beta2=0.3", "generation.engine=ray")
    assert started[6:] == ["trainer.rehearsal"]


def test_a_small_policy_of_our_own_is_not_tried_on_a_cpu() -> None:
    """So that `make demo` starts as soon as it did."""
    recipe, host = load_recipe("tiny"), Machine("one", (), 24, 20)
    shape = known_shape(recipe)
    assert preflight.trials(recipe, shape, host)[0] == []
    eager = load_recipe("tiny", ["learning.attention=flex"])
    for other, machine in ((eager, host), (recipe, cards(1, 80)), (recipe, Machine("one", (), 24, 0.5))):
        assert preflight.trials(other, shape, machine)[0]
    used = Machine("one", (Card("H", 80, 60.0),), 24, 20)
    assert preflight.trials(recipe, shape, used) == ([], "others work on the cards, so nothing is tried")
