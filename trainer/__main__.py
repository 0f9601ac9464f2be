"""`python -m trainer`: the learner's process, or, with more than one rank, its launcher.

Under torchrun or the deepspeed launcher (which set RANK) it is one rank. Started plainly it is the only rank, or
starts as many as the recipe asks for through torchrun's own launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path

from pipeline.errors import OaplError, WorkError


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
        from pipeline.policies import snapshots
        from pipeline.policies.fetch import fetch_policy
        from pipeline.recipe import load_recipe
        from pipeline.sharing.bring import bring

        arguments = _arguments()
        ranks = load_recipe(arguments.recipe).learning.ranks
        # What is missing is said before seconds are spent on imports and ranks.
        snapshots.load_record(fetch_policy(arguments.policy))
        if arguments.behaviour_policy is not None:
            snapshots.load_record(fetch_policy(arguments.behaviour_policy))
        bring(arguments.rollouts, arguments.round)
        if "RANK" in os.environ or ranks == 1:
            _be_a_rank(arguments)
        else:
            _launch(ranks)
    except OaplError as error:
        if "OAPL_ERROR_FILE" in os.environ:
            # A rank of ours: the launcher tells the person, once. The first to fail says why.
            path = Path(os.environ["OAPL_ERROR_FILE"])
            with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                json.dump([error.exit_code, str(error)], file)
        else:
            sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)


def _lost(error: RuntimeError) -> WorkError | None:
    """What to say where other ranks have gone; null where the error is of another kind."""
    import torch.distributed as dist

    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not GONE.search(text):
        return None
    return WorkError(
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} lost the others; look at the one "
        f"that ended first ({text[:160]})"
    )


GONE = re.compile(r"closed by peer|reset by peer|broken pipe|timed out|connection refused", re.IGNORECASE)
"""What gloo says, in an ordinary RuntimeError, where the process at the other end is no more."""
PR_SET_PDEATHSIG = 1


def _follow_the_agent() -> None:
    """Ends this rank with the agent that started it, so that other nodes notice: nobody else would end it."""
    import ctypes

    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _be_a_rank(arguments: argparse.Namespace) -> None:
    import logging

    _follow_the_agent()
    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a stage has one bar, its own

    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
    # DeepSpeed would compile a shared-memory collective for CPUs at first use: most of a minute and a C++ compiler,
    # where gloo is there already and has nothing to do on one machine's few ranks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    from pipeline.ending import leave

    _learn(arguments, "nccl" if torch.cuda.is_available() else "gloo")
    leave()


def _learn(arguments: argparse.Namespace, backend: str) -> None:
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
    deepspeed.init_distributed(backend, verbose=False)
    data = bring(arguments.rollouts, arguments.round)
    number = data.round if data.round is not None else read_manifest(data.rollouts).provenance.round
    run = Run(data.root.parent.parent, data.root.name)
    out = working_folder(arguments.out)
    log = arguments.log or (run.learning_log(number) if run.recipe.exists() else out / "learning.jsonl")
    behaviour = fetch_policy(arguments.behaviour_policy) if arguments.behaviour_policy is not None else None
    try:
        work = Round(recipe, data, policy, out, log, number, behaviour)
        summary = publishing.learn_for(arguments.out, work)
    except RuntimeError as error:
        lost = None if isinstance(error, OaplError) else _lost(error)
        if lost is None:
            raise
        raise lost from None
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        # After the group's end: the other ranks would take a long upload for a loss.
        publishing.send(arguments.out, summary["snapshot_id"])
        print(  # noqa: T201
            f"{arguments.out.rstrip('/')}/{summary['snapshot_id']}: {summary['steps']} steps, "
            f"{summary['sequences']:,} sequences, "
            f"log-probability gap {summary['logprob_gap']['mean']:+.5f} nats a token, {summary['seconds']:.1f} s"
        )


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _launch(ranks: int) -> None:
    """Starts the ranks on this machine through torchrun's launcher, and turns their failure into one line."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        os.environ["OAPL_ERROR_FILE"] = str(error_file)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            run_id="oapl",
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-P", "-m", "trainer", *sys.argv[1:])
        except ChildFailedError as failed:
            os.environ.pop("OAPL_ERROR_FILE")
            for rank, failure in failed.failures.items():
                # Where one rank has said why it ended, the launcher ends the others with SIGTERM.
                if failure.exitcode < 0 and not (failure.exitcode == -signal.SIGTERM and error_file.exists()):
                    raise WorkError(
                        f"rank {rank} of the learner was ended by signal {-failure.exitcode}; 9 is often a lack of "
                        "memory: see `oapl plan`"
                    ) from None
            if error_file.exists():
                code, message = json.loads(error_file.read_text(encoding="utf-8"))
                raised = WorkError(message)
                raised.exit_code = code
                raise raised from None
            raise


if __name__ == "__main__":
    main()
