"""Prompt sets: people's files, the embedded tasks, and what a round takes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from pipeline.errors import RequestError
from pipeline.prompts import tiny
from pipeline.prompts.files import make_prompt, read_prompts, write_prompts
from pipeline.prompts.sets import build_prompt_set, round_prompts
from pipeline.recipe import load_recipe


def test_a_prompt_file_of_either_form_gives_the_same_prompts(tmp_path: Path) -> None:
    lines = [
        {"task": "math", "prompt": "What is 2+2?", "answer": 4, "source": "mine"},
        {
            "task": "code",
            "messages": [{"role": "user", "content": "Print 1"}],
            "tests": {"inputs": [""], "outputs": ["1"]},
        },
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [p.answer for p in prompts] == ["4", None]
    assert json.loads(prompts[1].tests or "") == {"inputs": [""], "outputs": ["1"]}
    assert prompts[0].chat() == [{"role": "user", "content": "What is 2+2?"}]
    assert [p.source for p in prompts] == ["mine", "p"]
    assert write_prompts(tmp_path / "p.parquet", prompts) == 2
    assert read_prompts(tmp_path / "p.parquet") == prompts


def test_the_id_is_the_content() -> None:
    base = make_prompt("math", [("user", "x")], answer="1")
    assert base.prompt_id == make_prompt("math", [("user", "x")], answer="1", source="other", split="heldout").prompt_id
    others = [
        make_prompt("math", [("user", "y")], answer="1"),
        make_prompt("math", [("user", "x")], answer="2"),
        make_prompt("math", [("system", "x")], answer="1"),
        make_prompt("code", [("user", "x")], answer="1"),
    ]
    assert len({base.prompt_id, *(other.prompt_id for other in others)}) == 5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": "x", "answer": "1"}', "'task'"),
        ('{"task": "math", "answer": "1"}', "'messages'"),
        ('{"task": "math", "prompt": "x"}', "'answer'"),
        ('{"task": "math", "prompt": "x", "answer": ["1"]}', "'answer' must be"),
        ('{"task": "code", "prompt": "x", "tests": 3}', "'tests' must be"),
        ('{"task": "math", "messages": [{"role": 1}], "answer": "1"}', "'messages'"),
        ('{"task": "math", "prompt": "x", "answer": "1", "split": "dev"}', "'split'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    good = json.dumps({"task": "math", "prompt": "x", "answer": "1"})
    path = tmp_path / "p.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(RequestError) as caught:
        read_prompts(path)
    assert f"{path}, line 2" in str(caught.value)
    assert words in str(caught.value)


def test_no_file_an_empty_file_and_a_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no prompt file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="no prompts in it"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "not.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(RequestError, match="not a Parquet file"):
        read_prompts(tmp_path / "not.parquet")
    (tmp_path / "p.csv").write_text("task,prompt\n")
    with pytest.raises(RequestError, match=r"\.jsonl or \.parquet"):
        read_prompts(tmp_path / "p.csv")


def test_held_out_prompts_share_nothing_with_training_or_the_cold_start(tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    build_prompt_set(recipe, tmp_path / "prompts.parquet")
    prompts = read_prompts(tmp_path / "prompts.parquet")
    heldout = {p.messages for p in prompts if p.split == "heldout"}
    train = {p.messages for p in prompts if p.split == "train"}
    traces = {(("user", text),) for text, _ in islice(tiny.traces(recipe.seed, 0.5, 0.5), 20_000)}
    assert len(heldout) == recipe.prompts.heldout_count >= 128
    assert not heldout & train
    assert not heldout & traces
    assert len({p.prompt_id for p in prompts}) == len(prompts)


def test_a_share_of_a_plain_file_is_held_out_by_prompt(tmp_path: Path) -> None:
    mine = [make_prompt("math", [("user", f"{n}?")], answer=str(n)) for n in range(40)]
    write_prompts(tmp_path / "mine.parquet", mine)
    changes = [f"prompts.train={tmp_path / 'mine.parquet'}", "prompts.heldout=null", "prompts.heldout_count=10"]
    assert build_prompt_set(load_recipe("tiny", changes), tmp_path / "set.parquet") == {"train": 30, "heldout": 10}
    with pytest.raises(RequestError, match="not enough to hold out"):
        build_prompt_set(load_recipe("tiny", [*changes[:2], "prompts.heldout_count=40"]), tmp_path / "set.parquet")


def test_too_long_training_prompts_are_left_out_by_the_policys_own_tokenizer(
    tmp_path: Path, random_policy: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_policy)
    mine = [make_prompt("math", [("user", "1 + " * n + "1?")], answer=str(n)) for n in range(12)]
    lengths = [
        len(tokenizer.apply_chat_template(p.chat(), add_generation_prompt=True, return_dict=False)) for p in mine
    ]
    write_prompts(tmp_path / "train.parquet", mine[:10])
    write_prompts(tmp_path / "heldout.parquet", mine[10:])
    changes = ["policy.cold_start=null", f"policy.model={random_policy}", f"prompts.max_tokens={lengths[6]}"]
    changes += [f"prompts.{split}={tmp_path / split}.parquet" for split in ("train", "heldout")]
    assert build_prompt_set(load_recipe("tiny", changes), tmp_path / "set.parquet") == {
        "train": 7,
        "heldout": 2,
        "too_long": 3,
    }
    kept = read_prompts(tmp_path / "set.parquet")
    assert [prompt.prompt_id for prompt in kept] == [prompt.prompt_id for prompt in [*mine[:7], *mine[10:]]]
    with pytest.raises(RequestError, match="no training prompt has 1 tokens or fewer"):
        build_prompt_set(load_recipe("tiny", [*changes, "prompts.max_tokens=1"]), tmp_path / "set.parquet")
    with pytest.raises(RequestError, match=r"needs policy\.model"):
        build_prompt_set(load_recipe("tiny", ["prompts.max_tokens=9"]), tmp_path / "set.parquet")


def test_rounds_take_every_prompt_before_any_comes_back(tmp_path: Path) -> None:
    prompts = [make_prompt("math", [("user", f"{n}?")], answer=str(n)) for n in range(10)]
    path = tmp_path / "set.parquet"
    write_prompts(path, prompts)
    rounds = [[p.prompt_id for p in round_prompts(path, number, 4, seed=3)] for number in range(5)]
    assert all(len(set(taken)) == 4 for taken in rounds)
    assert len(set(rounds[0] + rounds[1])) == 8
    assert set(rounds[0] + rounds[1] + rounds[2]) == {p.prompt_id for p in prompts}
    assert rounds == [[p.prompt_id for p in round_prompts(path, number, 4, seed=3)] for number in range(5)]
    assert rounds[0] != [p.prompt_id for p in round_prompts(path, 0, 4, seed=4)]
    assert len(round_prompts(path, 0, 99, seed=3)) == 10


def test_right_traces_are_right_and_wrong_ones_wrong() -> None:
    """Each program is run and each sum is done anew here, apart from the module's own arithmetic."""
    for problem in tiny.problems(5, "train", 60):
        for trace, expected in ((problem.right, True), (problem.wrong, False)):
            if problem.task == "math":
                expression = problem.text.removeprefix("What is ").removesuffix("?")
                boxed = int(trace.rsplit("\\boxed{", 1)[1].removesuffix("}"))
                assert (boxed == eval(expression)) is expected
                assert problem.answer == str(eval(expression))
            else:
                assert problem.tests is not None
                tests = json.loads(problem.tests)
                code = trace.removeprefix("```python\n").removesuffix("\n```")
                outputs = [_run(code, text) for text in tests["inputs"]]
                assert (outputs == tests["outputs"]) is expected


def _run(code: str, text: str) -> str:
    out = io.StringIO()
    lines = iter(text.splitlines())
    with contextlib.redirect_stdout(out):
        exec(code, {"input": lambda: next(lines)})
    return out.getvalue()


def test_problems_do_not_hang_on_hash_randomisation() -> None:
    code = "from pipeline.prompts.tiny import problems; print([p.text for p in problems(1, 'heldout', 6)])"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": str(n)}, capture_output=True, text=True, check=True
        ).stdout
        for n in range(2)
    }
    assert len(runs) == 1
