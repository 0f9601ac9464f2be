"""`oapl run`: rounds one after another, through the data folder's Dagster instance, with progress on the terminal.

All rounds run in this process, which keeps its imports; each stage that computes is a process of its own. What an
earlier call finished is not done again. Afterwards `oapl ui` shows the runs, their metadata and pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assets.instance import prepare_home
from assets.settings import DEFAULT_RUN, Chosen
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.layout import Run, round_key
from pipeline.recipe import Recipe, load_recipe
from pipeline.report import STAGES, name_of, write_report
from pipeline.runs import open_run

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console
    from rich.table import Table

PASSING = re.compile(r" s left$")
"""A line that the next one replaces, on a terminal."""
INTERRUPTED = 130


def main() -> int:
    arguments = _arguments()
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        root = arguments.root.absolute()
        run = open_run(root, recipe)
        os.environ |= Chosen(root, str(run.recipe)).environment() | {"DAGSTER_HOME": str(prepare_home(root))}
        with _only_one(run), _terminal(run) as console:
            make_rounds(run, recipe, console)
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("oapl: interrupted; what was committed is kept, run the same command to go on\n")
        return INTERRUPTED
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assets.run_rounds", description=__doc__)
    parser.add_argument("--recipe", default=DEFAULT_RUN)
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--root", type=Path, default=Path("data"))
    return parser.parse_args()


@contextlib.contextmanager
def _only_one(run: Run) -> Iterator[None]:
    """Two calls over one run would open the same round twice."""
    with (run.path / ".running").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"run {run.path} is being worked on by another `oapl run`; wait for it") from None
        yield


@contextlib.contextmanager
def _terminal(run: Run) -> Iterator[Console]:
    """A console on the real standard error, while everything else that is written there goes to a file.

    Dagster captures the streams of a step and repeats them; none of that is for the person who waits.
    """
    from rich.console import Console

    log = run.path / "logs" / "dagster.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    sys.stdout.flush()
    streams = [os.dup(1), os.dup(2)]
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as screen, log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=screen, highlight=False)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(streams[0], 1)
            os.dup2(streams[1], 2)


def make_rounds(run: Run, recipe: Recipe, console: Console) -> None:
    """Materialises the recipe's rounds that are not there yet. Raises OaplError with the failed stage's one line."""
    started = time.monotonic()
    console.print(f"run [bold]{run.name}[/] in {run.path}: {recipe.rounds} rounds")
    missing = [round for round in range(recipe.rounds) if not _is_done(run, round)]
    for round in range(recipe.rounds):
        if round not in missing:
            console.print(f"round {round_key(round)}: was done before", style="dim")
    if missing:
        _materialise(run, missing, console)
    found = write_report(run)
    console.print()
    console.print(summary_table(found))
    console.print(f"{time.monotonic() - started:.0f} s. Picture: {run.picture}")
    console.print(f"Numbers: {run.summary}. Look around with `oapl ui --root {run.data}`.")


def _is_done(run: Run, round: int) -> bool:
    """Evaluated is the last thing that happens to a round; what lies before it was there then."""
    from pipeline.report import read_stages

    return run.evaluation(round).exists() and "evaluate" in read_stages(run, round)


def _materialise(run: Run, missing: list[int], console: Console) -> None:
    console.print("starting Dagster", style="dim")
    import dagster as dg

    from assets import rounds, terminal
    from assets.definitions import defs

    job = defs.resolve_job_def("whole_round")
    with dg.DagsterInstance.get() as instance:
        for round in missing:
            rounds.open_rounds(instance, round)
            with _progress(console, f"round {round_key(round)}", terminal.NAME):
                result = job.execute_in_process(
                    instance=instance,
                    partition_key=round_key(round),
                    raise_on_error=False,
                    run_config={"loggers": {"terminal": {}}},
                    tags={"oapl/run": run.name, "oapl/started by": "oapl run"},
                )
            if not result.success:
                raise _error_of(result, run)


@contextlib.contextmanager
def _progress(console: Console, what: str, logger: str) -> Iterator[None]:
    """Shows what steps say: the newest line live on a terminal, else a line each."""
    with console.status(f"{what} · starting") if console.is_terminal else contextlib.nullcontext() as status:
        handler = _Lines(console, what, status)
        logging.getLogger(logger).addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger(logger).removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self, console: Console, what: str, status: Any) -> None:
        super().__init__()
        self._console, self._what, self._status = console, what, status

    def emit(self, record: logging.LogRecord) -> None:
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        # What no step said is Dagster's own.
        if meta.get("dagster_event") is not None or meta.get("step_key") is None or record.levelno < logging.INFO:
            return
        text = f"{self._what} · {meta.get('orig_message', record.getMessage())}"
        if self._status is not None and (PASSING.search(text) or ": started;" in text):
            self._status.update(text.partition("; its whole")[0])
        else:
            self._console.print(text, markup=False, soft_wrap=True)


def _error_of(result: dg.ExecuteInProcessResult, run: Run) -> OaplError:
    """What the first failed check or step said, as the error that it was there."""
    for check in result.get_asset_check_evaluations():
        if not check.passed and check.blocking:
            asset = check.asset_key.path[-1]
            return WorkError(f"{asset} failed its check {check.check_name}: {check.description}")
    for event in result.all_events:
        if event.is_step_failure:
            failure = event.step_failure_data.user_failure_data
            if failure is not None and failure.description:
                code = failure.metadata.get("exit_code")
                kind = RequestError if code is not None and code.value == RequestError.exit_code else WorkError
                return kind(failure.description)
            error = event.step_failure_data.error
            words = _innermost(error) if error else "no reason was recorded"
            return WorkError(f"{event.step_key}: {words}; the whole story is in {run.path / 'logs' / 'dagster.log'}")
    return WorkError(f"the round was not finished; see {run.path / 'logs' / 'dagster.log'}")


def _innermost(error: Any) -> str:
    while error.cause is not None:
        error = error.cause
    return " ".join(str(error.message).split())


def summary_table(found: list[dict[str, Any]]) -> Table:
    """The report's entries for a terminal: pass@k with 95 % intervals, then each task's pass@1, reward and seconds."""
    from rich.table import Table

    table = Table(title="Held-out pass@k, 95 % intervals", title_justify="left", header_style="bold", pad_edge=False)
    ks = list(found[0]["eval"]) if found else []
    tasks = list(found[0]["eval_by_task"]) if found else []
    table.add_column("round")
    for head in ("step", *(f"pass@{k}" for k in ks), *(f"pass@{ks[0]}\n{task}" for task in tasks)):
        table.add_column(head, justify="right")
    for head in ("reward", *(f"{stage}\ns" for stage in STAGES)):
        table.add_column(head, justify="right")
    for entry in found:
        table.add_row(*_cells(entry, ks, tasks))
    return table


def _cells(entry: dict[str, Any], ks: list[str], tasks: list[str]) -> Iterator[str]:
    yield name_of(entry["round"])
    yield f"{entry['step']:,}"
    for k in ks:
        yield _estimate(entry["eval"][k], entry["ci"][k])
    for task in tasks:
        yield _estimate(entry["eval_by_task"][task][ks[0]], entry["ci_by_task"][task][ks[0]])
    yield "–" if entry["reward_mean"] is None else f"{entry['reward_mean']:.3f}"
    for stage in STAGES:
        yield f"{entry['seconds'][stage]:.1f}"


def _estimate(mean: float, span: tuple[float, float]) -> str:
    return f"{mean:.3f}\n{span[0]:.2f}–{span[1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
