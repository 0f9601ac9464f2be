"""How a process of the learner becomes one rank, or starts as many as the recipe asks for, on one node or several.

A process that finds RANK set is a rank, whoever started it. One that finds OAPL_NODE set starts its node's ranks
through torchrun's own launcher (it is the node's agent). Any other is the head: it starts the only rank, the ranks of
this machine, or an agent a node, and tells of what failed in one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import OaplError, WorkError
from pipeline.recipe import Learning
from trainer import nodes

ERROR_FILE = "OAPL_ERROR_FILE"
GONE = re.compile(r"closed by peer|reset by peer|broken pipe|timed out|connection refused", re.IGNORECASE)
"""What gloo says, in an ordinary RuntimeError, where the process at the other end is no more."""
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
PR_SET_PDEATHSIG = 1


def run(module: str, settings: Learning, work: Callable[[], None], cure: Callable[[], str]) -> None:
    """Runs `work` as a rank, or starts `python -m module` with this process's words as all the ranks there are to be.

    `cure` is asked where memory was short. Leaves the process; a failure is told in one line.
    """
    try:
        if "RANK" in os.environ or (settings.ranks == 1 and settings.nodes == 1):
            _be_a_rank(work, cure)
        elif nodes.NODE in os.environ:
            nodes.follow_the_head()
            _start_ranks(module, settings)
        elif settings.launcher == "local":
            _start_ranks(module, settings)
        else:
            nodes.start(module, settings)
    except OaplError as error:
        tell(error)


def tell(error: OaplError) -> None:
    """Ends the process with the error's one line, said once by whoever has the person's ear."""
    if ERROR_FILE in os.environ:
        # A rank of ours: the launcher tells the person, once. The first to fail says why.
        path = Path(os.environ[ERROR_FILE])
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            json.dump([error.exit_code, str(error)], file)
    else:
        sys.stderr.write(f"oapl: {error}\n")
        sys.stderr.flush()
    sys.exit(error.exit_code)


def _be_a_rank(work: Callable[[], None], cure: Callable[[], str]) -> None:
    _follow_the_agent()
    become_a_rank()
    from pipeline.ending import leave

    try:
        work()
    except (RuntimeError, MemoryError) as error:
        told = None if isinstance(error, OaplError) else _short_of_memory(error, cure) or _lost(error)
        if told is None:
            raise
        raise told from None
    leave()


def become_a_rank() -> None:
    """What comes before a process joins the others: the only rank where nobody said which one it is."""
    import logging

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
            "MASTER_PORT": str(nodes.free_port()),
        }
    # DeepSpeed would compile a shared-memory collective for CPUs at first use: most of a minute and a C++ compiler,
    # where gloo is there already and has nothing to do on one machine's few ranks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def backend() -> str:
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


def _short_of_memory(error: Exception, cure: Callable[[], str]) -> WorkError | None:
    """What to say where there was no memory left; null where the error is of another kind."""
    import torch

    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not NO_MEMORY.search(str(error)):
        return None
    where = "the host"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        where = f"its card's {card.total_memory / 2**30:.0f} GiB"
    return WorkError(f"rank {os.environ['RANK']} of the learner needs more memory than {where}; {cure()}")


def _lost(error: Exception) -> WorkError | None:
    """What to say where other ranks have gone; null where the error is of another kind."""
    import torch.distributed as dist

    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not GONE.search(text):
        return None
    return WorkError(
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} lost the others; look at the one "
        f"that ended first ({text[:160]})"
    )


def _follow_the_agent() -> None:
    """Ends this rank with the agent that started it, so that other nodes notice: nobody else would end it."""
    import ctypes

    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _start_ranks(module: str, settings: Learning) -> None:
    """Starts this node's ranks through torchrun's launcher, and turns their failure into one line."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ranks, place = settings.ranks, nodes.place()
    if place is not None:
        ranks = settings.ranks // place.nodes
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.json"
        os.environ[ERROR_FILE] = str(error_file)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        config = LaunchConfig(
            min_nodes=1 if place is None else place.nodes,
            max_nodes=1 if place is None else place.nodes,
            nproc_per_node=ranks,
            # On several nodes ranks are numbered in the order of the nodes, so that a node's are neighbours.
            rdzv_backend="c10d" if place is None else "static",
            rdzv_endpoint="127.0.0.1:0" if place is None else place.endpoint,
            rdzv_configs={} if place is None else {"rank": place.number, "timeout": nodes.MEETING_S},
            max_restarts=0,
            run_id="oapl",
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-P", "-m", module, *sys.argv[1:])
        except ChildFailedError as failed:
            raise _told(failed, error_file) from None
        finally:
            os.environ.pop(ERROR_FILE)


def _told(failed: Exception, error_file: Path) -> Exception:
    """What a rank said of its end, or what can be said of it."""
    failures = getattr(failed, "failures", {})
    for rank, failure in failures.items():
        # Where one rank has said why it ended, the launcher ends the others with SIGTERM.
        if failure.exitcode < 0 and not (failure.exitcode == -signal.SIGTERM and error_file.exists()):
            return WorkError(
                f"rank {rank} of the learner was ended by signal {-failure.exitcode}; 9 is often a lack of "
                "memory: see `oapl plan`"
            )
    if not error_file.exists():
        return failed
    code, message = json.loads(error_file.read_text(encoding="utf-8"))
    raised = WorkError(f"{socket.gethostname()}: {message}" if nodes.NODE in os.environ else message)
    raised.exit_code = code
    return raised
