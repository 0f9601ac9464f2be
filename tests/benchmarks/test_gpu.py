"""The GPU benchmark in small: what it says was measured, and what is planted is found. No card is needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import device, policies, tables, training, wheels
from benchmarks.gpu.__main__ import SECTIONS, main
from benchmarks.gpu.report import Section


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["run", "--small", "--out", str(out), *words])
    return code, json.loads(out.read_text(encoding="utf-8"))


def run_apart(out: Path, *words: str, planted: str = "") -> tuple[int, dict[str, Any]]:
    """All sections in one process, which becomes a rank and so must not be that of the tests; `planted` comes first."""
    told = ["run", "--small", "--one-process", "--out", str(out), *words]
    script = f"{planted}\nimport sys\nfrom benchmarks.gpu.__main__ import main\nsys.exit(main({told!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


PLANTED = """
from benchmarks.gpu import head
from benchmarks.gpu.parity import leaking
from trainer.attention import KERNELS

def broken(*_):
    raise RuntimeError("first line\\nno kernel image is available")

head.WAYS["ours"] = broken
with leaking("eager"):
    leaky = KERNELS["eager"]
KERNELS["eager"] = leaky
"""


def rows(result: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in result["sections"][section]["figures"]}


def test_each_section_measures_the_learners_own_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in SECTIONS if name != "start"]
    code, result = run_apart(tmp_path / "gpu.json", "--sections", ",".join(names))
    sections = result["sections"]
    assert list(sections) == names
    assert not [error for section in sections.values() for error in section["errors"]]
    missed = [bound for section in sections.values() for bound in section["bounds"] if bound["ok"] is False]
    assert missed == []
    assert (code, result["ok"]) == (0, True)

    for what, row in rows(result, "parity").items():
        alone = row["alone_gradients"]
        assert 0 < alone < (1e-4 if "float32" in what else 0.1)
        assert (row["gradients"] > 10 * alone) if "leak" in what else (0 < row["gradients"] < 3 * alone)
    ours, plain = rows(result, "head").values()
    assert 0 < ours["logprobs"] < 1e-2 and 0 < ours["weight_gradient"] < 3 * plain["weight_gradient"]
    few, many = rows(result, "accumulation").values()
    assert 1e-3 < few["bfloat16"] < many["bfloat16"]
    assert 0 < many["engine"] < 0.2 * many["bfloat16"]
    assert {what.split(",")[0] for what in rows(result, "training")} == {"module", "engine"}
    for row in rows(result, "training").values():
        assert row["tflops"] > 0 and row["planned_gib"] > 0 and row["peak_gib"] is None
    (published,) = rows(result, "publishing").values()
    assert published["gib"] * 2**30 == pytest.approx(2 * policies.TINY.parameters, rel=0.01)
    # A goal for a card is not passed on a CPU.
    assert {bound["ok"] for bound in sections["training"]["bounds"]} == {None}

    capsys.readouterr()
    assert main(["table", str(tmp_path / "gpu.json")]) == 0
    page = capsys.readouterr().out
    assert all(f"### {name}\n" in page for name in names)
    assert "not applicable" in page


def test_the_learner_starts_in_a_process_of_its_own_that_finds_no_compiler(tmp_path: Path) -> None:
    code, result = run(tmp_path / "gpu.json", "--sections", "start")
    assert (code, result["ok"]) == (0, True), result
    assert rows(result, "start")["first step without a compiler"]["moved"] > 0
    assert result["machine"]["small"] is True


def test_a_leak_and_a_failure_are_found_and_the_rest_is_measured(tmp_path: Path) -> None:
    code, result = run_apart(tmp_path / "gpu.json", "--sections", "parity,head,optimizer", planted=PLANTED)
    assert code == 1 and result["ok"] is False
    missed = {bound["what"] for bound in result["sections"]["parity"]["bounds"] if not bound["ok"]}
    assert missed == {
        f"eager, {dtype}: {part}' error over what is allowed"
        for dtype, part in product(("float32", "bfloat16"), ("logprobs", "gradients"))
    }
    (error,) = result["sections"]["head"]["errors"]
    assert error["error"] == "RuntimeError: no kernel image is available"
    assert "plain, 32 tokens" in rows(result, "head")
    # What nothing was found for is not passed.
    assert {bound["ok"] for bound in result["sections"]["head"]["bounds"]} == {False}
    assert rows(result, "optimizer")["fused, cpu"]["weights_s"] > 0


def test_what_is_late_is_left_out_and_its_bound_not_met() -> None:
    section = Section("some", seconds=0.0)
    late, infinite = section.expect("late", "at most", 1.0), section.expect("not a number", "at most", 1.0)
    section.steps({"late": lambda: late.meet(0.5)})
    infinite.meet(math.nan)
    assert [one["what"] for one in section.skipped] == ["late"]
    assert (late.ok, infinite.ok) == (False, False)
    assert section.as_dict()["ok"] is False
    assert "NOT MET" in tables.verdict(late.as_dict())


def test_a_run_without_time_ends_with_a_whole_result(tmp_path: Path) -> None:
    code, result = run(tmp_path / "gpu.json", "--minutes", "0.1")
    assert code == 1
    assert [section["errors"][0]["error"] for section in result["sections"].values()] == [
        "no time left of 0.1 minutes"
    ] * len(SECTIONS)


@pytest.mark.parametrize("mix", policies.MIXES)
def test_arithmetic_is_what_the_layers_do(mix: str) -> None:
    shape, tokens = policies.TINY, 96
    examples = policies.examples_of(mix, tokens, shape.vocabulary)
    taken = policies.laid_out(examples, "sdpa")
    assert taken.ids.numel() == tokens
    # Who sees whom, position by position: all of a prompt before it, and of its own completion.
    prompt, own = len(examples[0].prompt_tokens), [len(one.completion_tokens) - 1 for one in examples]
    pairs = sum(range(1, prompt + 1)) + sum(prompt + place for count in own for place in range(1, count + 1))
    assert policies.amount_of(examples).pairs == pairs
    model = policies.make(shape, torch.float32, "sdpa")
    layers = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name)
    scored = sum(len(one.completion_tokens) for one in examples)
    products = layers * tokens + shape.vocabulary * shape.hidden * scored
    # Queries by keys and weights by values, for each head and layer.
    products += 2 * pairs * shape.heads * shape.head_dim * shape.layers
    assert training.flops(model, examples) == 3 * 2 * products


def test_what_is_fetched_stands_in_the_lock() -> None:
    assert {*wheels.BUILT, *wheels.FETCHED} <= set(wheels._locked())


def test_a_file_that_is_no_result_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    for path in (tmp_path / "other.json", tmp_path / "missing.json"):
        assert main(["table", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


CUDA = torch.cuda


class Card:
    """What PyTorch tells of a card of 80 GiB whose allocator had peaked before; only calls that PyTorch has."""

    def __init__(self) -> None:
        self.held, self.most, self.waited = 100, 900, 0

    def __getattr__(self, name: str) -> Any:
        assert hasattr(CUDA, name), f"torch.cuda has no {name}"
        return lambda *_: True

    def synchronize(self) -> None:
        self.waited += 1

    def memory_allocated(self) -> int:
        return self.held

    def reset_peak_memory_stats(self) -> None:
        self.most = self.held

    def max_memory_allocated(self) -> int:
        return self.most

    def get_device_properties(self, _device: torch.device) -> Any:
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132
        )

    def current_device(self) -> int:
        return 0


def test_a_cards_memory_and_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    monkeypatch.setattr(device.torch, "cuda", card)

    def work() -> None:
        card.most = card.held + 50

    assert device.peak_above(work) == 50  # not the 900 of before
    assert device.timed(work) > 0 and card.waited >= 2
    told = device.describe(False)
    assert (told["device"], told["capability"], told["peak_bfloat16"]) == ("NVIDIA H100 80GB HBM3", "9.0", 989.5e12)
    assert device.peak_rate("NVIDIA H100 PCIe") == 756.5e12
    assert device.peak_rate("Something else") is None
