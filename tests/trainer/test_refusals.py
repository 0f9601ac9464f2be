"""What the learner refuses: one line, the right exit code, nothing published, the last snapshot as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_parts import Learned, Made, folder_hash, make_policy, start_trainer, write_dataset
from safetensors.torch import load_file, save_file

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


@pytest.fixture
def refused(learn_here: Learn, tmp_path: Path) -> Callable[..., OaplError]:
    """Learns and returns the refusal, after looking whether it left everything as it was."""

    def attempt(place: Path, recipe: Recipe, parent: Path, **more: Any) -> OaplError:
        before = folder_hash(parent)
        out = tmp_path / "out"
        with pytest.raises(OaplError) as caught:
            learn_here(place, recipe, parent=parent, out=out, **more)
        assert folder_hash(parent) == before
        assert not list(out.glob("*/snapshot.json")) and not list(out.glob("*/*.safetensors"))
        assert not (out / "learning.json").exists()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return caught.value

    return attempt


Refused = Callable[..., OaplError]


def test_a_foreign_tokenizer(refused: Refused, recipe: Recipes, dataset: Made, tmp_path: Path) -> None:
    other = make_policy(tmp_path / "other", 1, texts=["quite another text, another tokenizer"] * 20)
    error = refused(dataset.place, recipe(), other)
    assert isinstance(error, RequestError)
    assert str(other) in str(error) and str(dataset.place) in str(error) and "tokenizer" in str(error)


def test_a_gap_past_the_bound(refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    biased = write_dataset(tmp_path / "biased", policy, float64, shift=0.2, noise=0.0)
    error = refused(biased.place, recipe(), policy)
    assert isinstance(error, WorkError)
    assert "+0.2000 nats" in str(error) and "learning.max_logprob_gap=0.05" in str(error)


def test_a_gap_that_a_completion_adds_up(
    refused: Refused, learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """0.02 nats a token are within the bound of tokens; a residual feels their sum, times beta2."""
    biased = write_dataset(tmp_path / "biased", policy, float64, shift=0.02, noise=0.0)
    tokens = [
        len(row.completion_tokens) for group in biased.groups() if len({r for _, r in group}) > 1 for row, _ in group
    ]
    gap = 0.02 * sum(tokens) / len(tokens)
    error = refused(biased.place, recipe(beta2=0.9), policy)
    assert isinstance(error, WorkError) and f"{0.9 * gap:+.4f} of a reward in each residual" in str(error)
    assert "learning.max_residual_gap=0.05" in str(error)
    for admitted in ({"beta2": 0.9, "max_residual_gap": None}, {"beta2": 0.1}, {"beta2": 0.9, "loss": "grpo"}):
        learned = learn_here(biased.place, recipe(epochs=1, **admitted))
        residual = None if "loss" in admitted else pytest.approx(admitted["beta2"] * gap, rel=1e-3)
        assert learned.summary["residual_gap"] == residual
        assert learned.summary["logprob_gap"]["sequence_mean"] == pytest.approx(gap, rel=1e-3)
        assert learned.summary["attention"] == "sdpa"


def test_nothing_left_to_learn(refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    uniform = write_dataset(tmp_path / "uniform", policy, float64, reward=lambda prompt, sample: float(prompt % 2))
    error = refused(uniform.place, recipe(), policy)
    assert isinstance(error, WorkError)
    assert "6 of 6 groups have no variance" in str(error) and "learning.drop_uniform_groups=false" in str(error)


def test_no_reward_at_all(refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    unscorable = write_dataset(tmp_path / "unscorable", policy, float64, reward=lambda prompt, sample: None)
    error = refused(unscorable.place, recipe(), policy)
    assert isinstance(error, WorkError) and "no rollout has a reward" in str(error)


def test_missing_verdicts(refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare", policy, float64, verdicts=False)
    error = refused(bare.place, recipe(), policy)
    assert isinstance(error, RequestError) and "score them before learning" in str(error)


def test_missing_logprobs(refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare", policy, float64, logprobs=False)
    error = refused(bare.place, recipe(), policy)
    assert isinstance(error, RequestError) and "learning.behaviour=recomputed" in str(error)


def test_tokens_that_the_policy_does_not_know(
    refused: Refused, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """Imported data has no tokenizer hash to compare: its largest token is."""
    made = write_dataset(tmp_path / "data", policy, float64, tokenizer="unknown", largest=100_000)
    error = refused(made.place, recipe(), policy)
    assert isinstance(error, RequestError) and "has token 100000" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    refused: Refused, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path, value: float
) -> None:
    """The gap to the engine is not a number then, which is past every bound."""
    broken = copied(policy, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    error = refused(dataset.place, recipe(packing=False), broken)
    assert isinstance(error, WorkError) and "disagree by +nan" in str(error)


def copied(policy: Path, folder: Path) -> Path:
    """The policy's files without its record: a plain model's folder."""
    shutil.copytree(policy, folder, ignore=shutil.ignore_patterns("snapshot.json"))
    return folder


def test_weights_that_learning_breaks(refused: Refused, recipe: Recipes, dataset: Made, policy: Path) -> None:
    """A learning rate that overflows float32: the second step's loss or its gradient is not finite."""
    several = refused(dataset.place, recipe(learning_rate=0.99, weight_decay=1e36), policy)
    assert isinstance(several, WorkError)
    assert (
        "learning stopped at step 2: loss" in str(several)
        and "nan" in str(several)
        and "Lower learning.learning_rate" in str(several)
    )


def test_weights_that_the_last_step_breaks(refused: Refused, recipe: Recipes, dataset: Made, policy: Path) -> None:
    one_step = recipe(learning_rate=0.99, weight_decay=1e39, epochs=1, batch_size=1000)
    error = refused(dataset.place, one_step, policy)
    assert isinstance(error, WorkError) and "non-finite; nothing was published" in str(error)


def test_attention_that_packing_does_not_keep(
    refused: Refused, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that lets completions see each other is found out on the policy before anything is learned."""
    from trainer import attention

    def leaky(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, _: Any) -> torch.Tensor:
        parts = (whole.transpose(0, 1).unsqueeze(0) for whole in (query, key, value))
        together = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, scale=scale, enable_gqa=True
        )
        return together.squeeze(0).transpose(0, 1)

    monkeypatch.setitem(attention.KERNELS, "sdpa", leaky)
    error = refused(dataset.place, recipe(), policy)
    assert isinstance(error, RequestError) and "set learning.packing=false" in str(error)


def test_completions_of_a_prompt_that_see_each_other(
    refused: Refused, recipe: Recipes, dataset: Made, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leak within a group only, which rows of unlike prompts would not show."""
    from trainer import attention

    def leaky(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, layout: Any) -> torch.Tensor:
        own, prefix = layout.segment, layout.prefix
        group = torch.where(prefix == own, own, prefix)
        mask = (group[:, None] == group) & torch.ones(len(own), len(own), dtype=torch.bool).tril()
        parts = (whole.transpose(0, 1).unsqueeze(0) for whole in (query, key, value))
        together = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return together.squeeze(0).transpose(0, 1)

    monkeypatch.setitem(attention.KERNELS, "flex", leaky)
    monkeypatch.setattr(attention, "refuse_missing", lambda settings: None)
    error = refused(dataset.place, recipe(attention="flex"), policy)
    assert isinstance(error, RequestError) and "learning.attention=flex" in str(error)


@pytest.mark.parametrize(("ranks", "code"), [(1, 2), (2, 2)])
def test_the_command_says_it_in_one_line(
    ranks: int, code: int, recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    """A missing policy, through the launcher and without it."""
    done = start_trainer(recipe(ranks=ranks), dataset.place, tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"oapl: no policy in {tmp_path / 'nowhere'}")


def test_ranks_fail_together(recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    """A gap past the bound with two ranks: both stop, the launcher says why, once."""
    biased = write_dataset(tmp_path / "biased", policy, float64, shift=0.3)
    done = start_trainer(recipe(ranks=2), biased.place, policy, tmp_path / "out")
    assert done.returncode == 1
    assert sum(line.startswith("oapl: ") for line in done.stderr.splitlines()) == 1
    assert "nats a token" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*/snapshot.json"))


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"attention": "flash", "dtype": "bfloat16"}, "needs the package flash-attn, or kernels"),
        ({"attention": "flash"}, "needs learning.dtype=bfloat16"),
        ({"attention": "varlen"}, "needs learning.dtype=bfloat16"),
        ({"attention": "varlen", "dtype": "bfloat16"}, "needs an NVIDIA card"),
        ({"attention": "flex"}, "take sdpa"),
    ],
    ids=str,
)
def test_kernels_that_this_machine_lacks(
    settings: dict[str, Any], cure: str, refused: Refused, recipe: Recipes, dataset: Made, policy: Path
) -> None:
    if torch.cuda.is_available():
        settings = {**settings, "attention": "flash", "dtype": "float32"}  # a card runs them, in bfloat16
        cure = "flash"
    error = refused(dataset.place, recipe(**settings), policy)
    assert isinstance(error, RequestError) and cure in str(error)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"importance_cap": 2.0}, "importance_cap needs loss=grpo and behaviour=recomputed"),
        ({"offload": "all", "zero_stage": 2}, "offload=all needs zero_stage 3"),
        ({"attention": "flex", "packing": False}, "for packed batches"),
        ({"attention": "varlen", "packing": False}, "for packed batches"),
        ({"loss": "ppo"}, "learning.loss"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str, recipe: Recipes) -> None:
    with pytest.raises(RequestError) as caught:
        recipe(**settings)
    assert words in str(caught.value)
