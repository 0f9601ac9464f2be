"""Parts that tests of several rooms share: a small random policy, published as a snapshot."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

# Test processes share the cores: threads that spin while they wait would take them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of some thousand weights with the embedded tokenizer, untrained: `snapshots/<id>`."""
    import torch

    from pipeline import snapshots, tiny
    from pipeline.recipe import ColdStart
    from trainer.policy import make_model, make_tokenizer

    torch.manual_seed(0)
    settings = ColdStart(vocabulary=320, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=64)
    texts = [text for pair in islice(tiny.traces(0, 0.5, 0.5), 200) for text in pair]
    tokenizer = make_tokenizer(["user", "assistant", *texts], settings.vocabulary)
    model = make_model(settings, tokenizer)
    folder = tmp_path_factory.mktemp("policy") / "snapshots"

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    made = snapshots.publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)
    return folder / made.snapshot_id


def oapl(
    *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd or Path(__file__).parents[1],
        env={**os.environ, **(env or {})},
        timeout=300,
        check=False,
    )


@pytest.fixture(name="oapl", scope="session")
def _oapl() -> object:
    return oapl
