"""The command line's contract: exit codes, one clear line, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--recipe", "tiny", "--set", "learning.beta2=banana"], "learning.beta2"),
        (["run", "--recipe", "nothing"], "no recipe 'nothing'"),
        (["ui", "--set", "rounds=0"], "rounds"),
        (["generate", "--policy", "no-policy", "--prompts", "no-file", "--out", "OUT"], "no prompt file no-file"),
        (["evaluate", "--policy", "no-policy", "--prompts", "p", "--out", "OUT"], "no policy in no-policy"),
        (["train", "--policy", "no-policy", "--rollouts", "r", "--out", "OUT"], "no policy in no-policy"),
        (["verify", "no-file.jsonl", "--out", "OUT.jsonl"], "no-file.jsonl"),
        (["rollouts", "validate", "no-folder"], "no-folder"),
        (["compare", "--loss", "oapl,ppo", "--out", "OUT"], "--loss ppo: no such loss; known are oapl, grpo, sft"),
        (["compare", "--loss", "oapl", "--lag", "0", "--out", "OUT"], "--lag '0': expected numbers of 1 or more"),
        (["compare", "--loss", "oapl", "--seeds", "zero", "--out", "OUT"], "--seeds 'zero': expected whole numbers"),
        (["compare", "--loss", "oapl", "--rollouts", "no-folder", "--out", "OUT"], "no-folder: no such folder"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(tmp_path: Path, oapl: Oapl, words: list[str], said: str) -> None:
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    done = oapl(*words)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("oapl: ")
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_snapshot_is_said_before_anything_heavy(tmp_path: Path, oapl: Oapl) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"task": "math", "prompt": "1+1?", "answer": "2"}\n')
    done = oapl("generate", "--policy", tmp_path / "gone", "--prompts", prompts, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"oapl: no policy in {tmp_path / 'gone'}: expected a folder with config.json, weights and tokenizer"
    ]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['oapl', '--help']\n"
        "from pipeline.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'deepspeed', 'transformers', 'dagster', 'polars', 'pyarrow', 'sympy', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "generate" in done.stdout
