"""The command line. Its words are a contract; what does the work is imported when a command needs it."""

from __future__ import annotations

import os
import sys

import typer

from pipeline import modules
from pipeline.cli import prompts
from pipeline.cli.comparisons import compare
from pipeline.cli.completions import generate
from pipeline.cli.plans import plan, preflight
from pipeline.cli.policies import evaluate, train
from pipeline.cli.runs import run, ui
from pipeline.cli.verdicts import verify
from pipeline.ending import leave
from pipeline.errors import OaplError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rollout datasets and off-policy training for reasoning models: generate, judge, keep, share, learn.",
)

for command in (run, ui, generate, verify, train, evaluate, compare, plan, preflight):
    app.command()(command)
app.add_typer(prompts.app, name="prompts")


def _with_rollouts() -> typer.Typer:
    """The `oapl rollouts` commands are imported when one of them is asked for."""
    if "rollouts" in sys.argv[1:2] or "--help" in sys.argv[1:2] or len(sys.argv) == 1:
        from pipeline.cli.rollouts import app as rollouts

        app.add_typer(rollouts, name="rollouts")
    return app


def main() -> None:
    """Entry point: runs a command; an error meant for a person becomes one line and its exit code."""
    # Threads that spin while they wait take the core from whoever shares it: on two busy cores a training step
    # was seen to take seven times as long. Set here, since it is read when the first library with threads loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A short spin keeps most of what spinning gains where nobody else wants the core: a step of the cold start took
    # 0.165 s with it, 0.163 s always spinning, and 0.193 s without.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    modules.settle()
    try:
        _with_rollouts()()
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("oapl: interrupted; what was committed is kept, run the same command to go on\n")
        sys.exit(130)
    except SystemExit as end:
        if "vllm" in sys.modules and end.code in (0, None):
            leave()
        raise


if __name__ == "__main__":
    main()
