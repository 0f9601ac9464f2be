"""Learning from a dataset that somebody shared, on a machine without vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from learning_parts import make_policy, write_dataset

from pipeline.policies import snapshots
from pipeline.prompts.files import Prompt, write_prompts
from pipeline.rollouts.locate import locate
from pipeline.sharing.package import export_dataset, push_dataset
from pipeline.storage import durable

NO_VLLM = "raise ImportError('this machine has no vllm')\n"


def test_train_on_an_exported_dataset_given_by_url_without_vllm(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = make_policy(tmp_path / "policies", seed=1)
    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()
    made = write_dataset(tmp_path / "made", policy, model, prompts=8)
    ids = sorted({rollout.prompt_id for rollout, _ in made.rows})
    prompts = [Prompt(name, "math", "test", "train", (("user", name),), "1") for name in ids]
    write_prompts(tmp_path / "made" / "prompts.parquet", prompts)
    export_dataset(locate(tmp_path / "made"), tmp_path / "exported")
    push_dataset(tmp_path / "exported", f"file://{tmp_path}/bucket/set")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "vllm.py").write_text(NO_VLLM)
    (tmp_path / "recipe.yaml").write_text(
        "name: small\npolicy: {model: .}\nlearning: {batch_size: 8, max_logprob_gap: 1, "
        "max_residual_gap: 9, dtype: float32, learning_rate: 1.5e-4}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked"), "OAPL_CACHE": str(tmp_path / "cache")}
    oapl = [str(Path(sys.executable).with_name("oapl")), "train", "--recipe", str(tmp_path / "recipe.yaml")]
    where = ["--rollouts", f"file://{tmp_path}/bucket/set", "--policy", str(policy), "--out", str(tmp_path / "out")]
    blocked = subprocess.run([sys.executable, "-c", "import vllm"], env=environment, capture_output=True, text=True)
    assert "this machine has no vllm" in blocked.stderr
    result = subprocess.run([*oapl, *where], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (published,) = [path.parent for path in (tmp_path / "out").rglob("snapshot.json")]
    record = snapshots.verify(published)
    assert record.step > 0
    assert record.parent == snapshots.load_record(policy).snapshot_id
    assert durable.sha256_file(published / "model.safetensors") != durable.sha256_file(policy / "model.safetensors")
