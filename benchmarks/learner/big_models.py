"""Loading and publishing a model on two ranks under ZeRO-3: `python -m benchmarks.learner.big_models`.

A random bfloat16 Qwen3 of 200 million parameters. Loaded whole by each rank and then partitioned, which transformers
and DeepSpeed do where nothing is said, and shared out by `trainer.loading`. Published from whole weights gathered in
rank 0's memory, and streamed by `trainer.writing`. Peak resident memory of each rank above what it had before, MiB;
on a CPU a rank's share of the weights is in it, since there is no other memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner.parts import join_ranks, machine, on_ranks, random_policy
from pipeline.recipe import ColdStart, Learning

SHAPE = ColdStart(vocabulary=32_000, hidden=1024, layers=11, heads=16, kv_heads=8, head_dim=64, mlp=3072)
WAYS = ("load whole", "load shared", "publish gathered", "publish streamed")


def resident(peak: bool) -> float:
    """MiB of this process; the peak since it was last reset (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rank(way: str, policy: Path, out: Path) -> dict[str, float]:
    """What one rank does in one way."""
    join_ranks()
    import deepspeed

    from trainer import engine as engines
    from trainer.loading import load_shared
    from trainer.policy import load_policy

    settings = Learning(dtype="bfloat16", zero_stage=3, keep_optimizer=False)
    config = engines.deepspeed_config(settings)

    def load(shared: bool) -> Any:
        if shared:
            return load_shared(policy, torch.bfloat16, "sdpa", config)
        model = load_policy(policy, torch.bfloat16)
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.bfloat16)
        return model

    if way.startswith("load"):
        work = lambda: load(way == "load shared")  # noqa: E731
    else:
        model = load(True)
        work = lambda: _publish(way, model, policy, out)  # noqa: E731
    reset_peak()
    before, began = resident(peak=False), time.perf_counter()
    done = work()
    return {"mib": resident(peak=True) - before, "seconds": time.perf_counter() - began, "tensors": len(str(done)) > 0}


def _publish(way: str, model: Any, policy: Path, out: Path) -> Path:
    import deepspeed
    import torch.distributed as dist

    from pipeline.policies import snapshots
    from pipeline.policies.tensors import Planned, Writer
    from trainer import wholes
    from trainer.policy import save_settings

    folder, leads = out / way.replace(" ", "-"), dist.get_rank() == 0
    folder.mkdir(exist_ok=True)
    named = wholes.parameters(model)
    if way == "publish gathered":
        state = {}
        for name, parameter in named:
            with deepspeed.zero.GatheredParameters([parameter]):
                if leads:
                    state[name] = parameter.detach().cpu().clone()
        if leads:
            model.save_pretrained(folder, state_dict=state)
            snapshots.describe(folder, parent=None, round=None, step=0, recipe_sha256=None)
    else:
        writer = Writer(folder, "model", [Planned(n, "BF16", wholes.shape(p)) for n, p in named]) if leads else None
        for name, parameter in named:
            whole = wholes.master(parameter)
            if writer is not None:
                writer.write(name, wholes.as_bytes(whole.to(torch.bfloat16).cpu()))
        if writer is not None:
            writer.close()
            save_settings(model, policy, folder)
    dist.barrier()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        way, policy, out = arguments.rank
        found = rank(way, Path(policy), Path(out))
        sys.stdout.flush()
        print(json.dumps(found), flush=True)
        from pipeline.ending import leave

        leave()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(folder / "policy", SHAPE)
        size = sum(path.stat().st_size for path in policy.glob("*.safetensors"))
        print(f"{size / 4e6:,.0f} million parameters, {size / 2 / 2**20:,.0f} MiB in bfloat16")
        for way in WAYS:
            told = on_ranks(arguments.ranks, "benchmarks.learner.big_models", "--rank", way, policy, folder)
            peaks = ", ".join(f"{one['mib']:6,.0f}" for one in told)
            print(f"{way:18} MiB a rank: {peaks}   seconds: {max(one['seconds'] for one in told):6.1f}")


if __name__ == "__main__":
    main()
