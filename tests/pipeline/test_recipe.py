"""Recipes: what is refused, in which words, and what overrides do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.errors import RequestError
from pipeline.recipe import Recipe, differences, load_recipe, named_recipes
from pipeline.runs.open import open_run, run_recipe


@pytest.mark.parametrize("name", named_recipes())
def test_each_named_recipe_is_valid_and_says_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning.beta2=banana", ["learning.beta2", "number", "banana"]),
        ("learning.beta2=-1", ["learning.beta2", "greater than 0"]),
        ("learning.betta2=1", ["learning.betta2", "no such setting"]),
        ("generation.samples=1", ["generation.samples", "2"]),
        ("evaluation.samples=4", ["evaluation", "pass@16", "at least 16"]),
        ("policy.model=x", ["policy", "exactly one"]),
        ("name=a/b", ["name"]),
        ("nightly.cron=0 25 * * *", ["nightly", "five fields", "0 25 * * *"]),
        ("nightly.cron=0 2 * * jan", ["nightly", "five fields", "0 2 * * jan"]),
        ("nightly.cron=tonight", ["nightly", "five fields", "tonight"]),
        ("nightly.time_zone=Mars/Olympus", ["nightly", "no zone named 'Mars/Olympus'"]),
        ("rounds", ["rounds", "key.path=value"]),
        ("=3", ["key.path=value"]),
        ("seed.x.y=3", ["seed"]),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe("tiny", [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cron", ["30 3 * * 1-5", "*/15 0,12 1 1-6/2 *", "0 0 * * 7", "30 3 * jan,JUN MON-Fri"])
def test_a_schedule_is_any_cron_line(cron: str) -> None:
    recipe = load_recipe("tiny", [f"nightly.cron={cron!r}", "nightly.time_zone=Europe/Berlin"])
    assert (recipe.nightly.cron, recipe.nightly.time_zone) == (cron, "Europe/Berlin")


def test_what_is_quoted_is_text() -> None:
    assert load_recipe("tiny", ['learning.verifier_version="1"']).learning.verifier_version == "1"


def test_overrides_take_numbers_as_people_write_them() -> None:
    recipe = load_recipe("tiny", ["learning.learning_rate=1e-4", "evaluation.ks=[1,2]", "policy.cold_start.steps=3"])
    assert recipe.learning.learning_rate == 1e-4
    assert recipe.evaluation.ks == (1, 2)
    assert recipe.policy.cold_start is not None
    assert recipe.policy.cold_start.steps == 3


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no recipe 'nothing'.*tiny"):
        load_recipe("nothing")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [unclosed")
    with pytest.raises(RequestError, match=r"broken\.yaml: can't be read as YAML"):
        load_recipe(str(broken))
    broken.write_text("- a list")
    with pytest.raises(RequestError, match="expected a mapping"):
        load_recipe(str(broken))


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", ["seed=7"])
    recipe.save(tmp_path / "r.yaml")
    again = load_recipe(str(tmp_path / "r.yaml"))
    assert again == recipe
    assert again.digest() == recipe.digest() != load_recipe("tiny").digest()
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["learning"]["clip"] == recipe.learning.clip


def test_evaluation_samples_in_its_own_way_and_its_length_widens_the_model_length() -> None:
    settings = ["generation.top_k=5", "generation.max_tokens=100", "generation.max_model_len=150"]
    told = ["evaluation.temperature=0.6", "evaluation.top_p=0.95", "evaluation.max_tokens=400"]
    usual = load_recipe("tiny", settings).for_evaluation()
    longer = load_recipe("tiny", [*settings, *told]).for_evaluation()
    assert (usual.max_tokens, usual.max_model_len, usual.top_k, usual.samples) == (100, 150, 0, 16)
    assert (longer.max_tokens, longer.max_model_len, longer.temperature, longer.top_p) == (400, 450, 0.6, 0.95)
    assert load_recipe("tiny", [*settings, "evaluation.max_tokens=20"]).for_evaluation().max_model_len == 150


def test_a_run_is_gone_on_with_under_its_own_settings_only(tmp_path: Path) -> None:
    first = load_recipe("tiny")
    run = open_run(tmp_path, first)
    more: Recipe = load_recipe("tiny", ["rounds=9"])
    open_run(tmp_path, more)
    assert run_recipe(run).rounds == 9
    with pytest.raises(RequestError, match=r"learning\.beta2: 0\.\d+ -> 0\.7"):
        open_run(tmp_path, load_recipe("tiny", ["learning.beta2=0.7", "rounds=9"]))
    assert run_recipe(run).learning.beta2 == first.learning.beta2
    assert differences(first, more) == [f"rounds: {first.rounds} -> 9"]
