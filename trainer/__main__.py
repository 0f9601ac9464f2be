"""`python -m trainer`: the learner's process, or its launcher.

Under torchrun or the deepspeed launcher (which set RANK) it is one rank. Started plainly it is the only rank, or
starts as many as the recipe asks for, on this machine or on several (see `trainer.launching`).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipeline.errors import OaplError
from trainer import launching


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--recipe", required=True)
    # Folders or URLs.
    parser.add_argument("--rollouts", required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--behaviour-policy", default=None)
    parser.add_argument("--out", required=True)
    parser.add_argument("--round", type=int, default=None)
    parser.add_argument("--log", type=Path, default=None)
    # DeepSpeed's launcher says it to each rank, in words and in LOCAL_RANK; the latter is read.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    try:
        from pipeline.planning.preflight import cure_of, refuse_learner
        from pipeline.policies import snapshots
        from pipeline.policies.fetch import fetch_policy
        from pipeline.recipe import load_recipe
        from pipeline.sharing.bring import bring

        arguments = _arguments()
        recipe = load_recipe(arguments.recipe)
        # What is missing is said before seconds are spent on imports and ranks.
        policy = fetch_policy(arguments.policy)
        snapshots.load_record(policy)
        if arguments.behaviour_policy is not None:
            snapshots.load_record(fetch_policy(arguments.behaviour_policy))
        bring(arguments.rollouts, arguments.round)
        if "RANK" not in os.environ:
            refuse_learner(recipe, policy)
    except OaplError as error:
        launching.tell(error)
    launching.run("trainer", recipe.learning, lambda: _learn(arguments), lambda: cure_of(recipe, policy))


def _learn(arguments: argparse.Namespace) -> None:
    import deepspeed
    import torch.distributed as dist

    from pipeline.layout import Run
    from pipeline.policies.fetch import fetch_policy
    from pipeline.recipe import load_recipe
    from pipeline.rollouts.store import read_manifest
    from pipeline.sharing.bring import bring
    from pipeline.storage.working_copy import working_folder
    from trainer import publishing
    from trainer.work import Round

    recipe, policy = load_recipe(arguments.recipe), fetch_policy(arguments.policy)
    publishing.bring_kept(arguments.out, policy, recipe.learning)
    deepspeed.init_distributed(launching.backend(), verbose=False)
    data = bring(arguments.rollouts, arguments.round)
    number = data.round if data.round is not None else read_manifest(data.rollouts).provenance.round
    run = Run(data.root.parent.parent, data.root.name)
    out = working_folder(arguments.out)
    log = arguments.log or (run.learning_log(number) if run.recipe.exists() else out / "learning.jsonl")
    behaviour = fetch_policy(arguments.behaviour_policy) if arguments.behaviour_policy is not None else None
    work = Round(recipe, data, policy, out, log, number, behaviour)
    summary = publishing.learn_for(arguments.out, work)
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        # After the group's end: the other ranks would take a long upload for a loss.
        publishing.send(arguments.out, summary["snapshot_id"])
        found, wanted = summary["sequences"] * recipe.learning.epochs, recipe.learning.batch_size
        odd = f" (one odd batch: learning.batch_size is {wanted})" if found < wanted else ""
        print(  # noqa: T201
            f"{arguments.out.rstrip('/')}/{summary['snapshot_id']}: {summary['steps']} steps, "
            f"{summary['sequences']:,} sequences{odd}, "
            f"log-probability gap {summary['logprob_gap']['mean']:+.5f} nats a token, {summary['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
